//! `hypercast plugin ...`: what a surface team does with a component, a file a subcommand. `cargo hypercast` builds the
//! component and calls these.

pub mod bench;
pub mod check;
pub mod subject;
pub mod train;

/// Work on expert plugins
#[derive(Debug, clap::Args)]
pub struct PluginArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: Action,
}

/// What can be done with a plugin.
#[derive(Debug, clap::Subcommand)]
pub enum Action {
    /// Print what a component says of itself and what its network costs, or why it is refused
    Check(check::Args),
    /// Measure a component's calls and network, and the headroom to each limit
    Bench(bench::Args),
    /// Train a component on feature logs into a parameters file, with progressive NE
    Train(train::Args),
}

/// Runs the chosen action.
pub fn run(args: PluginArgs) -> anyhow::Result<()> {
    match args.action {
        Action::Check(args) => check::run(args),
        Action::Bench(args) => bench::run(args),
        Action::Train(args) => train::run(args),
    }
}
