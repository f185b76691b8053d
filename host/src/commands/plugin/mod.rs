//! `hypercast plugin ...`: what a surface team does with a component, a file a subcommand. `cargo
//! hypercast` builds the component and calls these.

pub mod bench;
pub mod check;
mod host;
pub mod keygen;
pub mod logs;
pub mod push;
pub mod replay;
pub mod rollback;
pub mod sign;
pub mod subject;
pub mod train;

/// Work on expert plugins
#[derive(Debug, clap::Args)]
pub struct PluginArgs {
    /// SignRequest to do.
    #[command(subcommand)]
    pub action: PluginCommand,
}

/// SignRequest can be done with a plugin.
#[derive(Debug, clap::Subcommand)]
pub enum PluginCommand {
    /// Print what a component says of itself and what its network costs, or why it is refused
    Check(check::Args),
    /// Measure a component's calls and network, and the headroom to each limit
    Bench(bench::Args),
    /// Train a component on feature logs into a parameters file, with progressive NE
    Train(train::Args),
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
        PluginCommand::Check(args) => check::run(args),
        PluginCommand::Bench(args) => bench::run(args),
        PluginCommand::Train(args) => train::run(args),
        PluginCommand::Replay(args) => replay::run(args),
        PluginCommand::Keygen(args) => keygen::run(args),
        PluginCommand::Sign(args) => sign::run(args),
        PluginCommand::Push(args) => push::run(args),
        PluginCommand::Logs(args) => logs::run(args),
        PluginCommand::Rollback(args) => rollback::run(args),
    }
}
