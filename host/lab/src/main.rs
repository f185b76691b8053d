//! The `hypercast-lab` command: see `hypercast-lab --help`.

use clap::{Parser, Subcommand};
use hypercast_lab::commands;

/// Tensor operators allocate and free large buffers all the time. The system allocator returns each to
/// the kernel, which costs a quarter of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Shows and measures HyperCast: the demo, evaluations, the paper's experiments, and benchmarks
#[derive(Debug, Parser)]
#[command(name = "hypercast-lab", version, max_term_width = 100)]
struct LabCli {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    Demo(commands::demo::DemoArgs),
    Evaluate(commands::evaluate::EvaluateArgs),
    Experiment(commands::experiment::ExperimentArgs),
    Bench(hypercast_lab::bench::BenchOptions),
}

fn main() -> anyhow::Result<()> {
    hypercast_core::trace::start();
    match LabCli::parse().command {
        LabCommand::Demo(args) => commands::demo::run(args),
        LabCommand::Evaluate(args) => commands::evaluate::run(args),
        LabCommand::Experiment(args) => commands::experiment::run(args),
        LabCommand::Bench(args) => commands::bench::run(args),
    }
}
