//! `hypercast train fm|expert` and `hypercast materialise`.

use std::path::PathBuf;

use clap::Subcommand;

use crate::{
    config::{Config, parse_time_ms},
    dataset::{Dataset, timeline::Span},
    engine,
    expert::Engine,
    stop::Stop,
    train::{expert, fm, follow_expert, follow_fm, logging, materialise, report},
};

/// Train the foundation model or an expert
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to train.
    #[command(subcommand)]
    pub what: What,
}

/// What can be trained.
#[derive(Debug, Subcommand)]
pub enum What {
    /// The foundation model, over the data set's stream; logs TAEs on the way
    Fm {
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
        config: PathBuf,
        /// Go on where the run was last saved (fm.save_every_requests)
        #[arg(long)]
        resume: bool,
        /// As a service.
        #[command(flatten)]
        follow: Follow,
    },
    /// An expert, from the feature logs alone
    Expert {
        /// Its name in the configuration; every expert if none is given
        name: Option<String>,
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
        config: PathBuf,
        /// As a service.
        #[command(flatten)]
        follow: FollowExpert,
    },
}

/// Training as a service.
#[derive(Debug, clap::Args)]
pub struct Follow {
    /// Learn from joined examples as they come, publish weights, and go on where it stopped
    #[arg(long, conflicts_with = "resume")]
    pub follow: bool,
    /// The FM version that is trained
    #[arg(long, requires = "follow", value_name = "VERSION", default_value = fm::FIRST_VERSION)]
    pub version: String,
    /// A saved trainer to begin this version with, instead of what `train fm` left
    #[arg(long, requires = "follow", value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// Answer GET /metrics here, for example 127.0.0.1:9464
    #[arg(long, requires = "follow", value_name = "ADDRESS")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Stop at the end of the stream instead of waiting for more
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// An expert's training as a service.
#[derive(Debug, clap::Args)]
pub struct FollowExpert {
    /// Learn from the feature logs as they grow, publish parameters, and go on where it stopped
    #[arg(long, requires = "name")]
    pub follow: bool,
    /// The version that is trained [default: the plugin's]
    #[arg(long, requires = "follow", value_name = "VERSION")]
    pub version: Option<String>,
    /// The FM version whose TAEs it learns with [default: the one that the logs hold]
    #[arg(long, requires = "follow", value_name = "VERSION")]
    pub fm: Option<String>,
    /// Surfaces to learn from, separated by commas [default: those of the configuration]
    #[arg(long, requires = "follow", value_name = "NAMES", value_delimiter = ',')]
    pub surface: Vec<String>,
    /// A checkpoint of the FM that gives TAEs on the spot, instead of the logs
    #[arg(long, requires = "follow", value_name = "DIR")]
    pub fm_checkpoint: Option<PathBuf>,
    /// Answer GET /metrics here, for example 127.0.0.1:9465
    #[arg(long, requires = "follow", value_name = "ADDRESS")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Stop at the end of the logs instead of waiting for more
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// Follows the feature logs until SIGTERM or SIGINT.
fn follow_logs(config: &Config, name: &str, args: FollowExpert) -> anyhow::Result<()> {
    let FollowExpert { version, fm, surface, fm_checkpoint, metrics, until_end, .. } = args;
    let options = follow_expert::FollowOptions {
        version,
        fm,
        surfaces: surface,
        fm_checkpoint,
        metrics,
        until_end,
    };
    let stop = Stop::on_signals()?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let guests = Engine::new(config.plugin_limits.engine())?;
    let ground = follow_expert::Ground {
        dataset: &dataset,
        config,
        entry: config.expert(name)?,
        guests: &guests,
    };
    let streams = engine::open(&config.engine)?;
    let out = &mut std::io::stdout();
    let report = follow_expert::follow(ground, streams, &options, (&stop, out))?;
    let (requests, corrections) =
        report.place.map_or((0, 0), |place| (place.requests, place.corrections));
    eprintln!(
        "learned from {requests} requests and {corrections} corrections of the logs; {} publications",
        report.published
    );
    Ok(())
}

/// Follows the joined examples until SIGTERM or SIGINT.
fn follow(config: &Config, dataset: &Dataset, args: Follow) -> anyhow::Result<()> {
    let Follow { version, from, metrics, until_end, .. } = args;
    let options = follow_fm::FollowOptions { version, from, metrics, until_end };
    let stop = Stop::on_signals()?;
    let engine = engine::open(&config.engine)?;
    let out = &mut std::io::stdout();
    let report = follow_fm::follow((dataset, config), engine, &options, (&stop, out))?;
    let follow_fm::FollowReport { requests, corrections, published, position } = report;
    eprintln!(
        "learned from {requests} requests and {corrections} corrections, up to {position}; {published} publications"
    );
    Ok(())
}

/// Trains and prints progressive metrics.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Fm { config, resume, follow: follow_args } => {
            let config = Config::read(&config)?;
            let dataset = Dataset::open(&config.paths.dataset)?;
            if follow_args.follow {
                return follow(&config, &dataset, follow_args);
            }
            let train = if resume { fm::resume } else { fm::train };
            let report = train(&dataset, &config, config.timeline.until_ms()?)?;
            print!("{}", report::table(&report.progressive));
            println!("checkpoint: {}", config.paths.fm.display());
            println!("logs: {} ({} rows)", config.paths.logs.display(), report.logged_rows);
        }
        What::Expert { name, config, follow } => {
            let config = Config::read(&config)?;
            if let (true, Some(name)) = (follow.follow, &name) {
                return follow_logs(&config, name, follow);
            }
            let engine = Engine::new(config.plugin_limits.engine())?;
            let entries = match &name {
                Some(name) => vec![config.expert(name)?.clone()],
                None => config.experts.clone(),
            };
            anyhow::ensure!(!entries.is_empty(), "the configuration has no [[experts]]");
            for entry in &entries {
                let report = expert::train(&config, entry, &engine)?;
                println!("{} ({}), {} rows, first pass:", report.name, report.plugin, report.rows);
                print!("{}", report::table(&report.progressive));
                println!("parameters: {}", report.parameters.display());
            }
        }
    }
    Ok(())
}

/// Write the TAEs of served items into feature logs, with a finished checkpoint or with every FM version in use
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
    /// Follow the joined examples as they come, with every FM version in use, until SIGTERM
    #[arg(long, conflicts_with_all = ["from", "until"])]
    pub follow: bool,
    /// Answer GET /metrics here, for example 127.0.0.1:9466
    #[arg(long, requires = "follow", value_name = "ADDRESS")]
    pub metrics: Option<std::net::SocketAddr>,
    /// Stop at the end of the stream instead of waiting for more
    #[arg(long, requires = "follow")]
    pub until_end: bool,
}

/// The logging tier until SIGTERM or SIGINT.
fn log_stream(config: &Config, args: &MaterialiseArgs) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let streams = engine::open(&config.engine)?;
    let mut active = logging::Registered::new(&*streams, &config.paths.fm)?;
    let options = logging::LoggingOptions { metrics: args.metrics, until_end: args.until_end };
    let out = &mut std::io::stdout();
    let report = logging::follow((&dataset, config), streams, &mut active, options, (&stop, out))?;
    let logging::LoggingReport { requests, rows, position } = report;
    eprintln!("logged {requests} requests, {rows} rows, up to {position}");
    Ok(())
}

/// Materialises and says how much.
pub fn run_materialise(args: MaterialiseArgs) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    if args.follow {
        return log_stream(&config, &args);
    }
    let offset = config.timeline.utc_offset_h;
    let time =
        |text: &Option<String>| text.as_deref().map(|text| parse_time_ms(text, offset)).transpose();
    let span = Span { from_ms: time(&args.from)?, until_ms: time(&args.until)? };
    let dataset = Dataset::open(&config.paths.dataset)?;
    let rows = materialise::materialise(&dataset, &config, span)?;
    println!("{rows} rows in {}", config.paths.logs.display());
    Ok(())
}
