//! `hypercast bench`: how fast a part is beside its rivals (see [`crate::bench`]).

use std::path::PathBuf;

use anyhow::Context;

use crate::bench::{self, Options, Part};
use hypercast_config::EngineKind;

/// Measure how fast a part is, beside rivals on the same machine
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which part
    #[arg(value_enum)]
    pub part: Part,
    /// Write the figures as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Timed repetitions of each figure; the median counts
    #[arg(long, value_name = "N", default_value_t = 21)]
    pub runs: usize,
    /// A Python that has PyTorch, for the rivals that need it
    #[arg(long, value_name = "PYTHON", default_value = "python3")]
    pub python: String,
    /// The folder of built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// The folder of built guests that misbehave
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/hostile")]
    pub hostile: PathBuf,
    /// One group of figures alone; kernels: attention, window, shared, step, history; store:
    /// reads, open, writer, formats, rivals; serving: logging, stages, load; engine: directory, nats;
    /// lifecycle: ingest, latency, publish; isolation: rank, faults, plugins, neighbours
    #[arg(long, value_name = "GROUP")]
    pub only: Option<String>,
    /// Rows of the store; they take about 290 bytes each on disk and in memory, and as much again for rivals
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    pub rows: usize,
    /// Seconds for which lifecycle's events come
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub seconds: u64,
    /// Publications that lifecycle applies under load
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub publications: usize,
    /// Milliseconds between them; an FM's trainer publishes every minute by default
    #[arg(long, value_name = "MS", default_value_t = 2000)]
    pub publish_every_ms: u64,
    /// What keeps lifecycle's streams; `nats` starts a nats-server that is in PATH
    #[arg(long, value_enum, default_value_t)]
    pub engine: EngineKind,
}

/// Measures, prints each figure as it comes, and writes them.
pub fn run(args: Args) -> anyhow::Result<()> {
    anyhow::ensure!(args.runs > 0, "--runs 0: at least one is needed");
    anyhow::ensure!(args.rows > 0, "--rows 0: at least one is needed");
    anyhow::ensure!(args.seconds >= 10, "--seconds {}: at least 10 are needed", args.seconds);
    anyhow::ensure!(args.publications >= 4, "--publications: at least 4 are needed");
    let options = Options {
        part: args.part,
        runs: args.runs,
        python: args.python,
        plugins: args.plugins,
        hostile: args.hostile,
        only: args.only,
        rows: args.rows,
        seconds: args.seconds,
        publications: args.publications,
        publish_every_ms: args.publish_every_ms,
        engine: args.engine,
    };
    let report = bench::run(&options)?;
    println!("{report}");
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
