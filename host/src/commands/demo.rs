//! (next)
/// x
#[derive(Debug, clap::Args)]
pub struct Args {}
/// x
pub fn run(_args: Args) -> anyhow::Result<()> { Ok(()) }
