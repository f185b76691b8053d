//! `hypercast plugin push COMPONENT HOST`: brings a signed component to a daemon, and tells how its
//! rollout goes.
//!
//! It ends with 0 once the version answers everybody, with 3 where it waits for an operator, and
//! with 1 where it was refused, given up or rolled back. Ending it does not end the rollout.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::bail;

use super::{host::Host, read, sign::SignRequest};
use hypercast_serve::admin::RolloutAnswer;
use hypercast_serve::rollout::{Push, PushManifest, Rollout, RolloutStep, SignedManifest};

/// How often it asks.
const POLL: Duration = Duration::from_millis(250);

/// How long a daemon may be away while a rollout goes on.
const PATIENCE: Duration = Duration::from_secs(60);

/// The exit status where a rollout waits for an operator.
const WAITS: i32 = 3;

/// Arguments of `hypercast plugin push`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component
    pub component: PathBuf,
    /// Where to
    #[command(flatten)]
    pub host: Host,
    /// Its signature; with --key it is signed at once [default: COMPONENT.sig]
    #[arg(long, value_name = "FILE", conflicts_with = "key")]
    pub signature: Option<PathBuf>,
    /// What a signature made now vouches for; the parameters in any case. Beside an existing
    /// signature, how its rollout is to go must be as it was signed
    #[command(flatten)]
    pub what: SignRequest,
    /// End once it is taken, instead of following its rollout
    #[arg(long)]
    pub no_wait: bool,
}

/// Sends the push and prints the steps of its rollout until it ends.
pub fn run(args: Args) -> anyhow::Result<()> {
    let signed = match (&args.what.key, &args.signature) {
        (Some(_), _) => args.what.sign(&args.component)?,
        (None, Some(path)) => SignedManifest::read(path)?,
        (None, None) => SignedManifest::read(&args.component.with_added_extension("sig"))?,
    };
    let PushManifest { name, version, .. } = signed.claims()?;
    let component = read(&args.component)?;
    let parameters = args.what.parameters.as_deref().map(read).transpose()?;
    let push = Push {
        signed,
        wishes: args.what.policy,
        component: &component,
        parameters: parameters.as_deref(),
    };
    let route = format!("/v1/admin/experts/{name}/versions/{version}");
    let answer: RolloutAnswer = args.host.post(&route, &push.encode())?;
    if !answer.begun {
        eprintln!("{name} {version} was pushed before; this is its rollout:");
    }
    let mut told = RolloutPrinter::default();
    told.tell(&answer.rollout);
    if args.no_wait {
        return Ok(());
    }
    let mut away: Option<Instant> = None;
    let mut rollout = answer.rollout;
    loop {
        match rollout.step {
            RolloutStep::Promoted => return Ok(()),
            RolloutStep::Waiting => std::process::exit(WAITS),
            RolloutStep::Failed | RolloutStep::RolledBack => {
                bail!("{name} {version} does not serve: {}", rollout.cause.unwrap_or_default())
            }
            RolloutStep::Replay | RolloutStep::Shadow | RolloutStep::Canary => {
                std::thread::sleep(POLL)
            }
        }
        match args.host.get::<RolloutAnswer>(&route) {
            Ok(answer) => {
                rollout = answer.rollout;
                told.tell(&rollout);
                away = None;
            }
            // A daemon that is started again goes on with its rollouts.
            Err(error) if away.get_or_insert_with(Instant::now).elapsed() > PATIENCE => {
                return Err(error);
            }
            Err(_) => {}
        }
    }
}

/// Lines of a rollout's log that were printed.
#[derive(Default)]
pub struct RolloutPrinter {
    last_ms: i64,
    lines: Vec<String>,
}

impl RolloutPrinter {
    /// Prints what is new.
    pub fn tell(&mut self, rollout: &Rollout) {
        for line in &rollout.log {
            let text = format!("{:<11} {}", line.step.word(), line.text);
            // Of one millisecond there may be several lines.
            if line.at_ms < self.last_ms
                || (line.at_ms == self.last_ms && self.lines.contains(&text))
            {
                continue;
            }
            if line.at_ms > self.last_ms {
                self.lines.clear();
            }
            println!("{text}");
            self.last_ms = line.at_ms;
            self.lines.push(text);
        }
    }
}
