//! The operator of the demo: decisions at fixed points of the replay, made with the commands that
//! an operator has, while requests come.
//!
//! A second version of the expert begins to learn, sees requests as a shadow, gets half of the
//! users, then all, and is rolled back; the retirement of a pinned FM version is refused. The
//! quality of versions decides nothing here.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    RunningDemo,
    prepare::{DemoSetup, EXPERT},
};
use crate::{
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
        lock(&self.failed).take()
    }

    /// The decisions so far.
    pub fn decisions(&self) -> Vec<DecisionRecord> {
        lock(&self.decisions).clone()
    }

    fn is_at(&self, share: f64) -> bool {
        self.share.load(Ordering::Relaxed) as f64 >= share * 1e6
    }
}

/// What `mutex` holds, whatever a thread that panicked left there.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Registers and promotes what serves from the beginning: both FMs and the first expert version.
///
/// # Errors
/// A registry that refuses.
pub fn begin(setup: &DemoSetup, processes: &ProcessGroup) -> Result<()> {
    let accepted = |words: &[&str]| processes.accepted(words, &setup.first);
    for version in VERSIONS {
        accepted(&["register", "fm", "--published", version])?;
        accepted(&["promote", "fm", version])?;
    }
    accepted(&["register", "expert", EXPERT, VERSIONS[0], "--published"])?;
    accepted(&["promote", "expert", EXPERT, VERSIONS[0]])
}

impl RunningDemo<'_> {
    /// Makes every decision when the replay has reached it.
    pub fn operate(&self) {
        for (share, decision) in DECISIONS {
            while !self.progress.is_at(share) {
                if self.stop.is_requested() {
                    return;
                }
                std::thread::sleep(POLL_INTERVAL);
            }
            if let Err(error) = self.decide(decision) {
                *lock(&self.progress.failed) = Some(error);
                return;
            }
            self.progress.made.fetch_add(1, Ordering::Release);
        }
    }

    fn decide(&self, decision: OperatorDecision) -> Result<()> {
        let [first, second] = VERSIONS;
        let promote = ["promote", "expert", EXPERT, second, "--share", "0.5"];
        let roll_back = &["rollback", "expert", EXPERT][..];
        let (words, share) = match decision {
            OperatorDecision::Train => {
                start_expert(self.setup, &mut lock(self.processes), second)?;
                self.published(second)?;
                self.versions(&["register", "expert", EXPERT, second, "--published"], true)?;
                return self.versions(&["shadow", "expert", EXPERT, second], true);
            }
            OperatorDecision::RetireFm => return self.versions(&["retire", "fm", first], false),
            OperatorDecision::PromoteHalf => (&promote[..], 0.5),
            OperatorDecision::PromoteAll => (&promote[..4], 1.0),
            OperatorDecision::RollBackHalf => (roll_back, 0.5),
            OperatorDecision::RollBackAll => (roll_back, 0.0),
        };
        self.versions(words, true)?;
        self.served(share)
    }

    /// Polls until `done`; whether it was in time.
    fn in_time(&self, mut done: impl FnMut() -> Result<bool>) -> Result<bool> {
        let until = Instant::now() + VERSION_WITHIN;
        while !done()? {
            if Instant::now() > until || self.stop.is_requested() {
                return Ok(false);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        Ok(true)
    }

    /// Waits for a trainer's first publication, without holding the processes.
    fn published(&self, version: &str) -> Result<()> {
        let name = trainer(version);
        let has = || Ok(lock(self.processes).find_output(&name, PUBLISHED)?.is_some());
        if self.in_time(has)? {
            return Ok(());
        }
        Err(Error::internal(format!(
            "expert {EXPERT} {version} has published nothing within {VERSION_WITHIN:?}"
        )))
    }

    /// Waits until the daemon gives the second version this share of users.
    fn served(&self, share: f64) -> Result<()> {
        let asked = Instant::now();
        let has = || {
            let live = self.client.live()?;
            let mut experts = live["experts"].as_array().into_iter().flatten();
            let second = experts.find(|own| own["name"] == EXPERT && own["version"] == VERSIONS[1]);
            let is = second.and_then(|own| own["share"].as_f64()).unwrap_or(0.0);
            Ok((is - share).abs() < 1e-9)
        };
        if !self.in_time(has)? {
            let problem = &self.client.live()?["problem"];
            return Err(Error::internal(format!(
                "the daemon does not serve as decided: {problem}"
            )));
        }
        if let Some(note) = lock(&self.progress.decisions).last_mut() {
            note.served_s = asked.elapsed().as_secs_f64();
            println!("  served so after {:.1} s", note.served_s);
        }
        Ok(())
    }

    /// Runs `hypercast versions`, and records whether it was refused.
    fn versions(&self, words: &[&str], is_allowed: bool) -> Result<()> {
        let answer = lock(self.processes).versions(words, &self.setup.first)?;
        let command = format!("hypercast versions {}", words.join(" "));
        println!("\n$ {command}");
        let refused = answer.as_ref().err().cloned();
        let note = DecisionRecord { command: command.clone(), refused, served_s: 0.0 };
        lock(&self.progress.decisions).push(note);
        match (answer, is_allowed) {
            (Ok(text), true) | (Err(text), false) => {
                text.lines().for_each(|line| println!("  {line}"));
                Ok(())
            }
            (Err(why), true) => Err(Error::internal(format!("{command}: {why}"))),
            (Ok(_), false) => Err(Error::internal(format!("{command}: it was not refused"))),
        }
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
    processes.start(&trainer(version), &words, &setup.first)
}
