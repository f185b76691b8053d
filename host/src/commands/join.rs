//! `hypercast join`: the joiner as a process of its own.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use hypercast_config::Config;
use hypercast_core::shutdown::Shutdown;
use hypercast_serve::metrics::Metrics;
use hypercast_stream::join::Runner;
use hypercast_stream::streams;
use hypercast_train::job_metrics;

use super::follow::Followed;

/// Join events to examples, for trainers and daemons that follow them
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// Answer GET /metrics and /readyz here, for example 127.0.0.1:9465
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
}

/// Joins until SIGTERM or SIGINT, then saves its state. With `--metrics` it prints where they are,
/// and when it is ready `joining from event N`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let signals = Shutdown::on_signals()?;
    let config = Config::read(&args.config)?;
    let metrics = Arc::new(Metrics::default());
    let _server = match args.metrics {
        Some(address) => {
            let (counted, ready) = (metrics.clone(), metrics.clone());
            let render = move || counted.render(None);
            let server = job_metrics::serve(address, render, move || ready.set_aside_warning())?;
            println!("metrics at http://{}/metrics", server.address());
            Some(server)
        }
        None => None,
    };
    Followed::streams(&config.paths.dataset).through_growths(&signals, |dataset, stop| {
        let engine = streams::open_with_shutdown(&config.engine, &signals)?;
        let (settings, metrics) = (config.joiner()?, metrics.clone());
        let runner = Runner::open(engine, &settings, &dataset, metrics, stop.clone())?;
        drop(dataset);
        println!("joining from event {}", runner.passed().events);
        Ok(runner.run(|_| {})?)
    })
}
