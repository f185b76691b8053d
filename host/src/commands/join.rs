//! `hypercast join`: the joiner as a process of its own.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{config::Config, dataset::Dataset, engine, join::Runner, serve::metrics::Metrics};

/// Join events to examples, for trainers and daemons that follow them
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
}

/// Joins until SIGTERM or SIGINT, then saves its state. When it is ready it prints `joining from event N`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let config = Config::read(&args.config)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let engine = engine::open(&config.engine)?;
    let stop = Arc::new(AtomicBool::new(false));
    let metrics = Arc::new(Metrics::new());
    let runner = Runner::open(engine, &config, &dataset, metrics, stop.clone())?;
    drop(dataset);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    println!("joining from event {}", runner.passed().events);
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut joining = tokio::task::spawn_blocking(move || runner.run(|_| {}));
        let asked = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            ended = &mut joining => Some(ended),
        };
        stop.store(true, Ordering::Relaxed);
        let ended = match asked {
            Some(ended) => ended,
            None => joining.await,
        };
        Ok(ended??)
    })
}
