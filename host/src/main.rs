//! The `hypercast` command: see `hypercast --help`.

use clap::{Parser, Subcommand};
use hypercast::commands;

/// Tensor operators allocate and free large buffers all the time; the system allocator gives each
/// back to the kernel, which costs a quarter of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A foundation model for recommendations, and experts as sandboxed Wasm plugins on top of it
#[derive(Debug, Parser)]
#[command(name = "hypercast", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Import(commands::import::Args),
    Simulate(commands::simulate::Args),
    Train(commands::train::Args),
    Materialise(commands::train::MaterialiseArgs),
    Serve(commands::serve::Args),
    Join(commands::join::Args),
    Plugin(commands::plugin::PluginArgs),
    Store(commands::store::StoreArgs),
    Demo(commands::demo::Args),
    Evaluate(commands::evaluate::Args),
    Experiment(commands::experiment::Args),
    Bench(commands::bench::Args),
    Versions(commands::versions::Args),
}

fn main() -> anyhow::Result<()> {
    hypercast::trace::start();
    match Cli::parse().command {
        Command::Import(args) => commands::import::run(args),
        Command::Simulate(args) => commands::simulate::run(args),
        Command::Train(args) => commands::train::run(args),
        Command::Materialise(args) => commands::train::run_materialise(args),
        Command::Serve(args) => commands::serve::run(args),
        Command::Join(args) => commands::join::run(args),
        Command::Plugin(args) => commands::plugin::run(args),
        Command::Store(args) => commands::store::run(args),
        Command::Demo(args) => commands::demo::run(args),
        Command::Evaluate(args) => commands::evaluate::run(args),
        Command::Experiment(args) => commands::experiment::run(args),
        Command::Bench(args) => commands::bench::run(args),
        Command::Versions(args) => commands::versions::run(args),
    }
}
