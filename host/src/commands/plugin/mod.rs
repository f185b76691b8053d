//! `hypercast plugin ...`: what a surface team does with a component, a file a subcommand. `cargo hypercast` builds the
//! component and calls these.

pub mod check;

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
}

/// Runs the chosen action.
pub fn run(args: PluginArgs) -> anyhow::Result<()> {
    match args.action {
        Action::Check(args) => check::run(args),
    }
}
