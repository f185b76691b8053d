//! The operator of the demo: decisions at fixed points of the replay, made with the commands that
//! an operator has, while requests come.
//!
//! A second version of the expert begins to learn, sees requests as a shadow, gets half of the
//! users, then all, and is rolled back; the retirement of a pinned FM version is refused. The
//! quality of versions decides nothing here.

use std::{
    ffi::OsStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_core::shutdown::Shutdown;
use serde::Serialize;

use super::prepare::{DemoSetup, EXPERT};
use crate::{
    demo::client::DemoClient,
    error::{CommonErrors as _, Error, Result},
    processes::ProcessGroup,
};

/// The FM versions, and the versions of the expert that pin them.
pub const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

/// The time that a version has to publish, or to be served.
pub const VERSION_WITHIN: Duration = Duration::from_secs(300);

const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The decisions, each after a share of the replay.
const DECISIONS: [(f64, OperatorDecision); 6] = [
    (0.15, OperatorDecision::Train),
    (0.35, OperatorDecision::PromoteHalf),
    (0.55, OperatorDecision::PromoteAll),
    (0.60, OperatorDecision::RetireFm),
    (0.75, OperatorDecision::RollBackHalf),
    (0.85, OperatorDecision::RollBackAll),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OperatorDecision {
    /// The second version begins to learn, and sees requests.
    Train,
    /// It gets half of the users.
    PromoteHalf,
    /// It gets all users.
    PromoteAll,
    /// The first FM is retired, which is refused because an expert pins it.
    RetireFm,
    /// Half of the users go back to the first version.
    RollBackHalf,
    /// All users do.
    RollBackAll,
}

/// How far the replay is, and which decisions were made.
#[derive(Debug, Default)]
pub struct ReplayProgress {
    /// The share of the replay, in millionths.
    share: AtomicU64,
    made: AtomicUsize,
    failed: Mutex<Option<Error>>,
    decisions: Mutex<Vec<DecisionRecord>>,
}

/// A decision that was made.
#[derive(Debug, Clone, Serialize)]
pub struct DecisionRecord {
    /// The command.
    pub command: String,
    /// The reason if it was refused.
    pub refused: Option<String>,
    /// Seconds until the daemon served accordingly.
    pub served_s: f64,
}

impl ReplayProgress {
    /// Records how far the replay is.
    pub fn advance_to(&self, share: f64) {
        self.share.store((share * 1e6) as u64, Ordering::Relaxed);
    }

    /// Whether the replay has reached the decision after the pending one, and must wait.
    pub fn is_ahead(&self, share: f64) -> bool {
        let made = self.made.load(Ordering::Acquire);
        let next = DECISIONS.get(made + 1).map_or(1.0, |(at, _)| *at);
        made < DECISIONS.len() && share >= next
    }

    /// The reason why the operator gave up; returned once.
    pub fn take_failure(&self) -> Option<Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The decisions so far.
    pub fn decisions(&self) -> Vec<DecisionRecord> {
        self.decisions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_at(&self, share: f64) -> bool {
        self.share.load(Ordering::Relaxed) as f64 >= share * 1e6
    }
}

/// Makes the decisions.
pub struct OperatorScript<'a> {
    /// The configurations.
    pub setup: &'a DemoSetup,
    /// The processes.
    pub processes: &'a Mutex<ProcessGroup>,
    /// The daemon.
    pub client: &'a DemoClient,
    /// Ends all waiting.
    pub stop: &'a Shutdown,
}

impl OperatorScript<'_> {
    /// Registers and promotes what serves from the beginning: both FMs and the first expert
    /// version.
    ///
    /// # Errors
    /// A registry that refuses.
    pub fn begin(setup: &DemoSetup, processes: &ProcessGroup) -> Result<()> {
        let accepted = |words: &[&str]| {
            versions(setup, processes, words)
                .and_then(|answer| answer.map(drop).map_err(Error::internal))
        };
        for version in VERSIONS {
            accepted(&["register", "fm", "--published", version])?;
            accepted(&["promote", "fm", version])?;
        }
        accepted(&["register", "expert", EXPERT, VERSIONS[0], "--published"])?;
        accepted(&["promote", "expert", EXPERT, VERSIONS[0]])
    }

    /// Makes every decision when the replay has reached it.
    pub fn follow(&self, progress: &ReplayProgress) {
        for (share, decision) in DECISIONS {
            while !progress.is_at(share) {
                if self.stop.is_requested() {
                    return;
                }
                std::thread::sleep(POLL_INTERVAL);
            }
            if let Err(error) = self.decide(decision, progress) {
                *progress.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
            progress.made.fetch_add(1, Ordering::Release);
        }
    }

    fn decide(&self, decision: OperatorDecision, progress: &ReplayProgress) -> Result<()> {
        let [first, second] = VERSIONS;
        match decision {
            OperatorDecision::Train => {
                start_expert(self.setup, &mut self.processes(), second)?;
                self.published(second)?;
                self.accepted(&["register", "expert", EXPERT, second, "--published"], progress)?;
                self.accepted(&["shadow", "expert", EXPERT, second], progress)
            }
            OperatorDecision::PromoteHalf => {
                self.accepted(&["promote", "expert", EXPERT, second, "--share", "0.5"], progress)?;
                self.served(0.5, progress)
            }
            OperatorDecision::PromoteAll => {
                self.accepted(&["promote", "expert", EXPERT, second], progress)?;
                self.served(1.0, progress)
            }
            OperatorDecision::RetireFm => self.refused(&["retire", "fm", first], progress),
            OperatorDecision::RollBackHalf => {
                self.accepted(&["rollback", "expert", EXPERT], progress)?;
                self.served(0.5, progress)
            }
            OperatorDecision::RollBackAll => {
                self.accepted(&["rollback", "expert", EXPERT], progress)?;
                self.served(0.0, progress)
            }
        }
    }

    /// Waits for a trainer's first publication, without holding the processes.
    fn published(&self, version: &str) -> Result<()> {
        let until = Instant::now() + VERSION_WITHIN;
        while self.processes().find_output(&trainer(version), PUBLISHED)?.is_none() {
            if Instant::now() > until || self.stop.is_requested() {
                return Err(Error::internal(format!(
                    "expert {EXPERT} {version} has published nothing within {VERSION_WITHIN:?}"
                )));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Waits until the daemon gives the second version this share of users.
    fn served(&self, share: f64, progress: &ReplayProgress) -> Result<()> {
        let asked = Instant::now();
        loop {
            let live = self.client.live()?;
            let experts = live["experts"].as_array().map(Vec::as_slice).unwrap_or_default();
            let second =
                experts.iter().find(|own| own["name"] == EXPERT && own["version"] == VERSIONS[1]);
            let is = second.and_then(|own| own["share"].as_f64()).unwrap_or(0.0);
            if (is - share).abs() < 1e-9 {
                break;
            }
            if asked.elapsed() > VERSION_WITHIN || self.stop.is_requested() {
                return Err(Error::internal(format!(
                    "the daemon does not serve as decided: {}",
                    live["problem"]
                )));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let mut notes = progress.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(note) = notes.last_mut() {
            note.served_s = asked.elapsed().as_secs_f64();
            println!("  served so after {:.1} s", note.served_s);
        }
        Ok(())
    }

    fn accepted(&self, words: &[&str], progress: &ReplayProgress) -> Result<()> {
        let answer = versions(self.setup, &self.processes(), words)?;
        self.record(words, None, progress);
        match answer {
            Ok(table) => {
                table.lines().for_each(|line| println!("  {line}"));
                Ok(())
            }
            Err(why) => {
                Err(Error::internal(format!("hypercast versions {}: {why}", words.join(" "))))
            }
        }
    }

    fn refused(&self, words: &[&str], progress: &ReplayProgress) -> Result<()> {
        match versions(self.setup, &self.processes(), words)? {
            Err(why) => {
                self.record(words, Some(why.clone()), progress);
                println!("  {why}");
                Ok(())
            }
            Ok(_) => Err(Error::internal(format!(
                "hypercast versions {}: it was not refused",
                words.join(" ")
            ))),
        }
    }

    fn record(&self, words: &[&str], refused: Option<String>, progress: &ReplayProgress) {
        let command = format!("hypercast versions {}", words.join(" "));
        println!("\n$ {command}");
        let note = DecisionRecord { command, refused, served_s: 0.0 };
        progress.decisions.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    fn processes(&self) -> std::sync::MutexGuard<'_, ProcessGroup> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The output of a trainer that has published.
pub const PUBLISHED: &str = "\"kind\":\"published\"";

/// The name of a version's trainer.
pub fn trainer(version: &str) -> String {
    format!("train-{EXPERT}-{version}")
}

/// Starts the trainer of a version of the expert, which uses the FM of the same version.
///
/// # Errors
/// A process that cannot be started.
pub fn start_expert(setup: &DemoSetup, processes: &mut ProcessGroup, version: &str) -> Result<()> {
    let words = ["train", "expert", EXPERT, "--follow", "--version", version, "--fm", version];
    let mut args: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
    args.extend([OsStr::new("--config"), setup.first.as_os_str()]);
    processes.start(&trainer(version), &args)
}

/// Runs `hypercast versions`: the table, or the reason for a refusal.
fn versions(
    setup: &DemoSetup,
    processes: &ProcessGroup,
    words: &[&str],
) -> Result<std::result::Result<String, String>> {
    let mut args = vec![OsStr::new("versions")];
    args.extend(words.iter().map(OsStr::new));
    args.extend([OsStr::new("--config"), setup.first.as_os_str()]);
    processes.output(&args)
}
