//! `hypercast train fm|expert` and `hypercast materialise`.

use std::path::PathBuf;

use clap::Subcommand;

use crate::{
    config::{Config, parse_time_ms},
    dataset::{Dataset, timeline::Span},
    expert::Engine,
    train::{expert, fm, materialise, report},
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
    },
    /// An expert, from the feature logs alone
    Expert {
        /// Its name in the configuration; every expert if none is given
        name: Option<String>,
        /// The configuration file
        #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
        config: PathBuf,
    },
}

/// Trains and prints progressive metrics.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Fm { config, resume } => {
            let config = Config::read(&config)?;
            let dataset = Dataset::open(&config.paths.dataset)?;
            let train = if resume { fm::resume } else { fm::train };
            let report = train(&dataset, &config, config.timeline.until_ms()?)?;
            print!("{}", report::table(&report.progressive));
            println!("checkpoint: {}", config.paths.fm.display());
            println!("logs: {} ({} rows)", config.paths.logs.display(), report.logged_rows);
        }
        What::Expert { name, config } => {
            let config = Config::read(&config)?;
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
}

/// Materialises and says how much.
pub fn run_materialise(args: MaterialiseArgs) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let offset = config.timeline.utc_offset_h;
    let time =
        |text: &Option<String>| text.as_deref().map(|text| parse_time_ms(text, offset)).transpose();
    let span = Span { from_ms: time(&args.from)?, until_ms: time(&args.until)? };
    let dataset = Dataset::open(&config.paths.dataset)?;
    let rows = materialise::materialise(&dataset, &config, span)?;
    println!("{rows} rows in {}", config.paths.logs.display());
    Ok(())
}
