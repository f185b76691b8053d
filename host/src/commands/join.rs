//! `hypercast join`: the joiner as a process of its own.

use std::{path::PathBuf, sync::Arc};

use crate::{
    config::Config, dataset::Dataset, engine, join::Runner, serve::metrics::Metrics, stop::Stop,
};

/// Join events to examples, for trainers and daemons that follow them
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
}

/// Joins until SIGTERM or SIGINT, then saves its state. When it is ready it prints `joining from event N`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let stop = Stop::on_signals()?;
    let config = Config::read(&args.config)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let engine = engine::open(&config.engine)?;
    let runner = Runner::open(engine, &config, &dataset, Arc::new(Metrics::new()), stop)?;
    drop(dataset);
    println!("joining from event {}", runner.passed().events);
    Ok(runner.run(|_| {})?)
}
