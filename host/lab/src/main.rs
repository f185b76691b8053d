//! The `hypercast-lab` command: see `hypercast-lab --help`.

use clap::{Parser, Subcommand};
use hypercast_lab::commands;

/// Tensor operators allocate and free large buffers all the time; the system allocator gives each
/// back to the kernel, which costs a quarter of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Shows and measures HyperCast: the demo, evaluations, the paper's experiments, and benchmarks
#[derive(Debug, Parser)]
#[command(name = "hypercast-lab", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Demo(commands::demo::Args),
    Evaluate(commands::evaluate::Args),
    Experiment(commands::experiment::Args),
    Bench(commands::bench::Args),
}

fn main() -> anyhow::Result<()> {
    hypercast_core::logging::start();
    match Cli::parse().command {
        Command::Demo(args) => commands::demo::run(args),
        Command::Evaluate(args) => commands::evaluate::run(args),
        Command::Experiment(args) => commands::experiment::run(args),
        Command::Bench(args) => commands::bench::run(args),
    }
}
