//! `hypercast plugin logs NAME HOST`: an expert's rollouts, what its plugin wrote of late, and its
//! faults.

use super::{host::Host, push::RolloutPrinter};
use hypercast_serve::admin::LogsAnswer;

/// Arguments of `hypercast plugin logs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The expert's name
    pub name: String,
    /// Whom to ask
    #[command(flatten)]
    pub host: Host,
    /// Rollouts to print, the newest ones
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub rollouts: usize,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

/// Asks the daemon and prints rollouts, log lines and faults of the expert.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut answer: LogsAnswer = args.host.get(&format!("/v1/admin/experts/{}/logs", args.name))?;
    let before = answer.rollouts.len().saturating_sub(args.rollouts);
    answer.rollouts.drain(..before);
    if args.json {
        println!("{}", serde_json::to_string_pretty(&answer)?);
        return Ok(());
    }
    for rollout in &answer.rollouts {
        println!("{} ({})", rollout.label(), rollout.step.word());
        RolloutPrinter::default().tell(rollout);
        println!();
    }
    // Times are UTC, by the daemon's clock.
    let time = |ms: i64| {
        let s = ms.div_euclid(1000).rem_euclid(86_400);
        format!("{:02}:{:02}:{:02}.{:03}", s / 3600, s / 60 % 60, s % 60, ms.rem_euclid(1000))
    };
    for fault in &answer.faults {
        println!("{} {} fault: {}", time(fault.at_ms), fault.arm, fault.text);
    }
    for line in &answer.lines {
        println!("{} {} {}: {}", time(line.at_ms), line.plugin, line.level, line.text);
    }
    Ok(())
}
