//! `hypercast train fm|expert` and `hypercast materialise`.

use std::{net::SocketAddr, path::PathBuf};

use clap::Subcommand;

use hypercast_config::{Config, parse_time_ms};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::check;
use hypercast_data::dataset::Dataset;
use hypercast_expert::Engine;
use hypercast_stream::streams;
use hypercast_train::{
    ServiceContext, expert, fm,
    follow_expert::{self, ExpertContext},
    follow_fm,
    logging::{self, LoggingOptions, Registered},
    materialise::{self, EmbeddingCheckpoint},
    report,
};

use super::follow::Followed;

/// Train the foundation model or an expert
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model to train.
    #[command(subcommand)]
    pub what: TrainTarget,
}

/// The models that can be trained.
#[derive(Debug, Subcommand)]
pub enum TrainTarget {
    /// The foundation model, over the data set's stream; logs TAEs on the way
    Fm {
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
        config: PathBuf,
        /// Go on where the run was last saved (fm.save_every_requests)
        #[arg(long)]
        resume: bool,
        /// Train on a data set that the check refuses, and say what is made of each fault
        #[arg(long, conflicts_with = "follow")]
        force: bool,
        /// Training as a service.
        #[command(flatten)]
        follow: FollowArgs,
    },
    /// An expert, from the feature logs alone
    Expert(ExpertArgs),
}

/// The experts to train, and how.
#[derive(Debug, clap::Args)]
pub struct ExpertArgs {
    /// Its name in the configuration; every expert if none is given
    pub name: Option<String>,
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// The FM version whose TAEs it learns with; needed where the logs hold several
    #[arg(long = "fm", value_name = "VERSION")]
    pub fm: Option<String>,
    /// Compute TAEs with this checkpoint on the spot, instead of reading them from the logs
    #[arg(long, value_name = "DIR", conflicts_with = "fm")]
    pub fm_checkpoint: Option<PathBuf>,
    /// The first day (or millisecond) of requests to embed, with --fm-checkpoint; the beginning if
    /// missing
    #[arg(long, value_name = "TIME", requires = "fm_checkpoint")]
    pub from: Option<String>,
    /// Embed requests that are older than what the checkpoint learned from, which was other data
    #[arg(long, requires = "fm_checkpoint")]
    pub allow_look_ahead: bool,
    /// Train on a data set that the check refuses, with --fm-checkpoint
    #[arg(long, requires = "fm_checkpoint", conflicts_with = "follow")]
    pub force: bool,
    /// Go on behind the stream until SIGTERM: learn from logs as they are written, save, publish
    #[arg(long, requires = "name")]
    pub follow: bool,
    /// Which version is trained, with --follow; the plugin's own if missing
    #[arg(long, value_name = "VERSION", requires = "follow")]
    pub version: Option<String>,
    /// A surface to learn from, with --follow (may be repeated); those of the configuration if
    /// missing
    #[arg(long = "surface", value_name = "SURFACE", requires = "follow")]
    pub surfaces: Vec<String>,
    /// Answer /metrics and /readyz at this address, with --follow
    #[arg(long, value_name = "ADDRESS", requires = "follow")]
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of what is there, with --follow
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// Training as a service.
#[derive(Debug, clap::Args)]
pub struct FollowArgs {
    /// Learn from joined examples as they come, publish weights, and go on where it stopped
    #[arg(long, conflicts_with = "resume")]
    pub follow: bool,
    /// The FM version that is trained
    #[arg(long, requires = "follow", value_name = "VERSION", default_value = fm::FIRST_VERSION)]
    pub version: String,
    /// A saved trainer to begin this version with, instead of what `train fm` left
    #[arg(long, requires = "follow", value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// Answer GET /metrics and /readyz here, for example 127.0.0.1:9464
    #[arg(long, requires = "follow", value_name = "ADDRESS")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Stop at the end of the stream instead of waiting for more
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// Follows the joined examples until SIGTERM or SIGINT.
fn follow(config: &Config, args: FollowArgs) -> anyhow::Result<()> {
    let FollowArgs { version, from, metrics, until_end, .. } = args;
    let options = follow_fm::FollowFmOptions { version, from, metrics, until_end };
    let signals = Shutdown::on_signals()?;
    Followed::by_fm_trainer(&config.paths.dataset).through_growths(&signals, |dataset, stop| {
        let engine = streams::open_with_shutdown(&config.engine, &signals)?;
        let context = ServiceContext { dataset: &dataset, config, engine };
        let report = follow_fm::follow(context, &options, stop, &mut std::io::stdout())?;
        let follow_fm::FollowFmReport { requests, corrections, published, held, position, .. } =
            report;
        let held = if held > 0 { format!(", {held} held") } else { String::new() };
        eprintln!(
            "learned from {requests} requests and {corrections} corrections, up to {position}; {published} publications{held}"
        );
        Ok(())
    })
}

/// Trains and prints progressive metrics.
pub fn run(args: Args) -> anyhow::Result<()> {
    hypercast_fm::threads::start_shared_pool()?;
    match args.what {
        TrainTarget::Fm { config, resume, force, follow: follow_args } => {
            let config = Config::read(&config)?;
            if follow_args.follow {
                return follow(&config, follow_args);
            }
            let dataset = Dataset::open(&config.paths.dataset)?;
            check::admit(&dataset, force)?;
            let train = if resume { fm::resume } else { fm::train };
            let report = train(&dataset, &config, config.timeline.until_ms()?)?;
            print!("{}", report::table(&report.progressive));
            println!("checkpoint: {}", report.checkpoint.display());
            println!("logs: {} ({} rows)", config.paths.logs.display(), report.logged_rows);
            let serving = config.paths.fm.display();
            match report.doubt {
                Some(why) if report.checkpoint != config.paths.fm => anyhow::bail!(
                    "held: {why}; {serving} was left as it is (copy {} to it to serve it all the same)",
                    report.checkpoint.display()
                ),
                Some(why) => eprintln!("warning: {why}; train it longer before {serving} serves"),
                None => {}
            }
        }
        TrainTarget::Expert(args) => train_experts(args)?,
    }
    Ok(())
}

/// A day by the clock of `timeline`, or a millisecond.
fn time_ms(config: &Config, text: Option<&str>) -> anyhow::Result<Option<i64>> {
    let offset_h = config.timeline.utc_offset_h;
    Ok(text.map(|text| parse_time_ms(text, offset_h)).transpose()?)
}

fn train_experts(args: ExpertArgs) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let from_ms = time_ms(&config, args.from.as_deref())?;
    let allow_look_ahead = args.allow_look_ahead;
    let checkpoint =
        args.fm_checkpoint.map(|dir| EmbeddingCheckpoint { dir, from_ms, allow_look_ahead });
    let guests = Engine::new(config.guests())?;
    if let (true, Some(name)) = (args.follow, &args.name) {
        let entry = config.expert(name)?;
        let options = follow_expert::FollowExpertOptions {
            version: args.version,
            fm: args.fm,
            surfaces: args.surfaces,
            fm_checkpoint: checkpoint,
            metrics: args.metrics,
            until_end: args.until_end,
        };
        let signals = Shutdown::on_signals()?;
        let dataset = &*config.paths.dataset;
        let followed = match options.fm_checkpoint {
            Some(_) => Followed::streams(dataset),
            // The logs are followed, whose writer takes a growth over before.
            None => Followed::logs(dataset, &config.paths.logs),
        };
        return followed.through_growths(&signals, |dataset, stop| {
            let streams = streams::open_with_shutdown(&config.engine, &signals)?;
            let (dataset, guests) = (&dataset, &guests);
            let context = ExpertContext { dataset, config: &config, entry, guests };
            follow_expert::follow(context, streams, &options, stop, &mut std::io::stdout())?;
            Ok(())
        });
    }
    let entries = match &args.name {
        Some(name) => vec![config.expert(name)?.clone()],
        None => config.experts.clone(),
    };
    anyhow::ensure!(!entries.is_empty(), "the configuration has no [[experts]]");
    if checkpoint.is_some() {
        check::admit(&Dataset::open(&config.paths.dataset)?, args.force)?;
    }
    let mut held = Vec::new();
    for entry in &entries {
        let source = match &checkpoint {
            Some(checkpoint) => expert::TrainingSource::Checkpoint(checkpoint),
            None => expert::TrainingSource::Logs(args.fm.as_deref()),
        };
        let report = expert::train(&config, entry, &guests, source)?;
        println!(
            "{} ({}), {} rows, before they were learned from:",
            report.name, report.plugin, report.rows
        );
        print!("{}", report::table(&report.progressive));
        report.passes.iter().for_each(|passes| println!("{passes}"));
        match report.held {
            None => println!("parameters: {}", report.parameters.display()),
            Some(own) => {
                println!(
                    "held: {}\ncandidate: {} (copy it to {} to serve it all the same)",
                    own.reason,
                    own.candidate.display(),
                    report.parameters.display()
                );
                held.push(format!("{}: {}", report.name, own.reason));
            }
        }
    }
    anyhow::ensure!(held.is_empty(), "what serves was left as it is; {}", held.join("; "));
    Ok(())
}

/// Write the TAEs of served items into feature logs, with a finished checkpoint
#[derive(Debug, clap::Args)]
pub struct MaterialiseArgs {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// The first day (or millisecond) of requests; the beginning if missing
    #[arg(long, value_name = "TIME")]
    pub from: Option<String>,
    /// The day (or millisecond) to end before; the end of the data set if missing
    #[arg(long, value_name = "TIME")]
    pub until: Option<String>,
    /// Write logs of a data set that the check refuses
    #[arg(long, conflicts_with = "follow")]
    pub force: bool,
    /// Embed requests that are older than what the checkpoint learned from, which was other data
    #[arg(long, conflicts_with = "follow")]
    pub allow_look_ahead: bool,
    /// Follow the joined examples until SIGTERM, with every FM version that is in use: the
    /// logging tier
    #[arg(long, conflicts_with_all = ["from", "until"])]
    pub follow: bool,
    /// Answer /metrics and /readyz at this address, with --follow
    #[arg(long, value_name = "ADDRESS", requires = "follow")]
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of the stream, with --follow
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// Materialises and says how much.
pub fn run_materialise(args: MaterialiseArgs) -> anyhow::Result<()> {
    hypercast_fm::threads::start_shared_pool()?;
    let config = Config::read(&args.config)?;
    if args.follow {
        let signals = Shutdown::on_signals()?;
        let options = LoggingOptions { metrics: args.metrics, until_end: args.until_end };
        let followed = Followed::streams(&config.paths.dataset);
        return followed.through_growths(&signals, |dataset, stop| {
            let streams = streams::open_with_shutdown(&config.engine, &signals)?;
            let mut active = Registered::new(&*streams, &config.paths.fm)?;
            let (dataset, engine) = (&dataset, streams.clone());
            let context = ServiceContext { dataset, config: &config, engine };
            let mut active = || active.to_log(&*streams);
            logging::follow(context, &mut active, options, stop, &mut std::io::stdout())?;
            Ok(())
        });
    }
    let checkpoint = EmbeddingCheckpoint {
        dir: config.paths.fm.clone(),
        from_ms: time_ms(&config, args.from.as_deref())?,
        allow_look_ahead: args.allow_look_ahead,
    };
    let until_ms = time_ms(&config, args.until.as_deref())?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    check::admit(&dataset, args.force)?;
    let rows = materialise::materialise(&dataset, &config, &checkpoint, until_ms)?;
    println!("{rows} rows in {}", config.paths.logs.display());
    Ok(())
}
