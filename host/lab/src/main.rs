//! The `hypercast-lab` command: see `hypercast-lab --help`.

use clap::Parser;
use hypercast_lab::commands::{LabCommand, run};

/// Tensor operators allocate and free large buffers all the time. The system allocator returns each
/// to the kernel, which costs a quarter of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Shows and measures HyperCast: the demo, evaluations, the paper's experiments, and benchmarks
#[derive(Debug, Parser)]
#[command(name = "hypercast-lab", version, max_term_width = 100)]
struct LabCli {
    #[command(subcommand)]
    command: LabCommand,
}

fn main() -> anyhow::Result<()> {
    hypercast_core::logging::start();
    let LabCli { command } = LabCli::parse();
    hypercast_fm::threads::start_shared_pool()?;
    run(command)
}
