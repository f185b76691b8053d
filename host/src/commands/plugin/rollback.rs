//! `hypercast plugin rollback NAME HOST`: ends an expert's rollouts, and gives its users back to
//! the version before.

use super::host::Host;
use hypercast_serve::admin::DoneAnswer;

/// Arguments of `hypercast plugin rollback`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The expert's name
    pub name: String,
    /// Whom to ask
    #[command(flatten)]
    pub host: Host,
}

/// Rolls back, and says what was ended and who answers then.
pub fn run(args: Args) -> anyhow::Result<()> {
    let route = format!("/v1/admin/experts/{}/rollback", args.name);
    let answer: DoneAnswer = args.host.post(&route, b"")?;
    println!("{}", answer.done);
    Ok(())
}
