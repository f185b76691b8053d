//! `hypercast join`: the joiner as a process of its own.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use hypercast_config::Config;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_serve::metrics::Metrics;
use hypercast_stream::join::Runner;
use hypercast_stream::streams;
use hypercast_train::job_metrics;

/// Join events to examples, for trainers and daemons that follow them
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The configuration file
    #[arg(long, value_name = "FILE", default_value = "hypercast.toml")]
    pub config: PathBuf,
    /// Answer GET /metrics here, for example 127.0.0.1:9465
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<SocketAddr>,
}

/// Joins until SIGTERM or SIGINT, then saves its state. With `--metrics` it prints where they are,
/// and when it is ready `joining from event N`.
pub fn run(args: Args) -> anyhow::Result<()> {
    let stop = Shutdown::on_signals()?;
    let config = Config::read(&args.config)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let engine = streams::open(&config.engine)?;
    let metrics = Arc::new(Metrics::default());
    if let Some(address) = args.metrics {
        let metrics = metrics.clone();
        let address = job_metrics::serve(address, move || metrics.render(None))?;
        println!("metrics at http://{address}/metrics");
    }
    let runner = Runner::open(engine, &config.joiner()?, &dataset, metrics, stop)?;
    drop(dataset);
    println!("joining from event {}", runner.passed().events);
    Ok(runner.run(|_| {})?)
}
