//! The `hypercast` command: see `hypercast --help`.

mod commands;

use clap::{Parser, Subcommand};

/// Tensor operators allocate and free large buffers all the time; the system allocator gives each
/// back to the kernel, which costs a quarter of a training step.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A foundation model for recommendations, and experts as sandboxed Wasm plugins on top of it
#[derive(Debug, Parser)]
#[command(name = "hypercast", version, max_term_width = 100)]
struct HypercastCli {
    #[command(subcommand)]
    command: HypercastCommand,
}

#[derive(Debug, Subcommand)]
enum HypercastCommand {
    Data(commands::data::Args),
    Schema(commands::schema::Args),
    Import(commands::import::Args),
    Simulate(commands::simulate::Args),
    Train(commands::train::Args),
    Materialise(commands::train::MaterialiseArgs),
    Serve(commands::serve::Args),
    Join(commands::join::Args),
    Plugin(Box<commands::plugin::PluginArgs>),
    Store(commands::store::StoreArgs),
    Versions(commands::versions::Args),
    DeadLetters(commands::dead_letters::Args),
    /// Names the program that has the commands which this one had once.
    #[command(name = "demo", aliases = ["evaluate", "experiment", "bench"], hide = true)]
    Moved(MovedArgs),
}

#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
struct MovedArgs {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    _args: Vec<std::ffi::OsString>,
}

fn main() -> anyhow::Result<()> {
    hypercast_core::logging::start();
    match HypercastCli::parse().command {
        HypercastCommand::Data(args) => commands::data::run(args),
        HypercastCommand::Schema(args) => commands::schema::run(args),
        HypercastCommand::Import(args) => commands::import::run(args),
        HypercastCommand::Simulate(args) => commands::simulate::run(args),
        HypercastCommand::Train(args) => commands::train::run(args),
        HypercastCommand::Materialise(args) => commands::train::run_materialise(args),
        HypercastCommand::Serve(args) => commands::serve::run(args),
        HypercastCommand::Join(args) => commands::join::run(args),
        HypercastCommand::Plugin(args) => commands::plugin::run(*args),
        HypercastCommand::Store(args) => commands::store::run(args),
        HypercastCommand::Versions(args) => commands::versions::run(args),
        HypercastCommand::DeadLetters(args) => commands::dead_letters::run(args),
        HypercastCommand::Moved(_) => anyhow::bail!(
            "demo, evaluate, experiment and bench are commands of `hypercast-lab`, with the same \
             options: install it with `cargo install --locked --path host/lab`"
        ),
    }
}
