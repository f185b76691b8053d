//! `hypercast plugin ...`: what a surface team does with a component, a file a subcommand. `cargo
//! hypercast` builds the component and calls these.

pub mod bench;
pub mod check;
pub mod harness;
pub(crate) mod host;
pub mod init;
pub mod keygen;
pub mod link;
pub mod logs;
pub mod push;
pub mod replay;
pub mod rollback;
pub mod run;
pub mod sign;
pub mod subject;
pub mod train;

use std::path::Path;

use anyhow::Context;

/// Work on expert plugins
#[derive(Debug, clap::Args)]
pub struct PluginArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: PluginSubcommand,
}

/// What can be done with a plugin.
#[derive(Debug, clap::Subcommand)]
pub enum PluginSubcommand {
    /// Print what a component says of itself and what its network costs, or why it is refused
    Check(check::Args),
    /// Measure a component's calls and network, and the headroom to each limit
    Bench(bench::Args),
    /// Rank one request in JSON, the body of `POST /v1/rank`, and print the answer with predictions
    Run(run::Args),
    /// Name a component in a configuration, and have a running daemon read it
    Link(link::Args),
    /// Answer the questions of `hypercast-testkit` on standard input, a line of JSON each
    Harness,
    /// Train a component on feature logs into a parameters file, with progressive NE
    Train(train::Args),
    /// Write the parameters that a network of given values begins with, to serve it untrained
    Init(init::Args),
    /// Run a component over recorded requests, beside another version or what was answered
    Replay(replay::Args),
    /// Make a key that signs pushes
    Keygen(keygen::Args),
    /// Vouch for a component and its parameters with a key
    Sign(sign::Args),
    /// Bring a signed component to a daemon, and follow its rollout
    Push(push::Args),
    /// Print an expert's rollouts, what its plugin wrote, and its faults
    Logs(logs::Args),
    /// Give an expert's users back to the version before
    Rollback(rollback::Args),
}

/// Runs the chosen action.
pub fn run(args: PluginArgs) -> anyhow::Result<()> {
    match args.action {
        PluginSubcommand::Check(args) => check::run(args),
        PluginSubcommand::Bench(args) => bench::run(args),
        PluginSubcommand::Run(args) => run::run(args),
        PluginSubcommand::Link(args) => link::run(args),
        PluginSubcommand::Harness => harness::run(),
        PluginSubcommand::Train(args) => train::run(args),
        PluginSubcommand::Init(args) => init::run(args),
        PluginSubcommand::Replay(args) => replay::run(args),
        PluginSubcommand::Keygen(args) => keygen::run(args),
        PluginSubcommand::Sign(args) => sign::run(args),
        PluginSubcommand::Push(args) => push::run(args),
        PluginSubcommand::Logs(args) => logs::run(args),
        PluginSubcommand::Rollback(args) => rollback::run(args),
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}
