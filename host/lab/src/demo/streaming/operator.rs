//! The operator of the demo: what is decided at which point of the replay, by the
//! commands that an operator has, while requests come.
//!
//! A second version of the expert begins to learn, sees requests as a shadow, gets half of the users, then all, and is
//! rolled back; an FM version that is pinned is not retired. Nothing is decided here by how good a version is.

use std::{
    ffi::OsStr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use serde::Serialize;

use super::{
    client::Client,
    prepare::{EXPERT, Ground},
    processes::Fleet,
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::shutdown::Shutdown;

/// The FM versions, and the versions of the expert that pin them.
pub const VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

/// How long a version may take to publish, or to be served.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// How often something that is awaited is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A decision, and the share of the replay after which it comes.
const DECISIONS: [(f64, Decision); 6] = [
    (0.15, Decision::Train),
    (0.35, Decision::Share),
    (0.55, Decision::Whole),
    (0.60, Decision::Retire),
    (0.75, Decision::RollBack),
    (0.85, Decision::RollBackWhole),
];

/// What is decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    /// The second version begins to learn, and sees requests.
    Train,
    /// Half of the users are its own.
    Share,
    /// All of them are.
    Whole,
    /// The first FM is to go, which is refused.
    Retire,
    /// Half of the users are given back.
    RollBack,
    /// All of them are.
    RollBackWhole,
}

/// How far the replay is, and which decisions are made.
#[derive(Debug, Default)]
pub struct Course {
    /// In millionths.
    share: AtomicU64,
    made: AtomicUsize,
    failed: Mutex<Option<Error>>,
    notes: Mutex<Vec<Note>>,
}

/// A decision that was made.
#[derive(Debug, Clone, Serialize)]
pub struct Note {
    /// The command.
    pub command: String,
    /// Whether it was refused, with the reason.
    pub refused: Option<String>,
    /// Seconds until the daemon served so.
    pub served_s: f64,
}

impl Course {
    /// Notes how far the replay is.
    pub fn went_to(&self, share: f64) {
        self.share.store((share * 1e6) as u64, Ordering::Relaxed);
    }

    /// Whether the replay is at the decision after one that is not made yet, and has to wait.
    pub fn is_ahead(&self, share: f64) -> bool {
        let made = self.made.load(Ordering::Acquire);
        let next = DECISIONS.get(made + 1).map_or(1.0, |(at, _)| *at);
        made < DECISIONS.len() && share >= next
    }

    /// The reason why the operator gave up, once.
    pub fn failed(&self) -> Option<Error> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// What was decided.
    pub fn notes(&self) -> Vec<Note> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn is_at(&self, share: f64) -> bool {
        self.share.load(Ordering::Relaxed) as f64 >= share * 1e6
    }
}

/// Who decides.
pub struct Operator<'a> {
    /// The configurations.
    pub ground: &'a Ground,
    /// The processes.
    pub fleet: &'a Mutex<Fleet>,
    /// The daemon.
    pub client: &'a Client,
    /// Whether to stop.
    pub stop: &'a Shutdown,
}

impl Operator<'_> {
    /// Registers and promotes what serves from the beginning: both FMs, and the first version of the expert.
    ///
    /// # Errors
    /// A registry that refuses.
    pub fn begin(ground: &Ground, fleet: &Fleet) -> Result<()> {
        let well = |words: &[&str]| {
            versions(ground, fleet, words).and_then(|said| said.map(drop).map_err(Error::invalid))
        };
        for version in VERSIONS {
            well(&["register", "fm", "--published", version])?;
            well(&["promote", "fm", version])?;
        }
        well(&["register", "expert", EXPERT, VERSIONS[0], "--published"])?;
        well(&["promote", "expert", EXPERT, VERSIONS[0]])
    }

    /// Makes every decision when the replay is there.
    pub fn follow(&self, course: &Course) {
        for (share, decision) in DECISIONS {
            while !course.is_at(share) {
                if self.stop.is_requested() {
                    return;
                }
                std::thread::sleep(LOOK_EVERY);
            }
            if let Err(error) = self.decide(decision, course) {
                *course.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
            course.made.fetch_add(1, Ordering::Release);
        }
    }

    fn decide(&self, decision: Decision, course: &Course) -> Result<()> {
        let [first, second] = VERSIONS;
        match decision {
            Decision::Train => {
                start_expert(self.ground, &mut self.fleet(), second)?;
                self.published(second)?;
                self.well(&["register", "expert", EXPERT, second, "--published"], course)?;
                self.well(&["shadow", "expert", EXPERT, second], course)
            }
            Decision::Share => {
                self.well(&["promote", "expert", EXPERT, second, "--share", "0.5"], course)?;
                self.served(0.5, course)
            }
            Decision::Whole => {
                self.well(&["promote", "expert", EXPERT, second], course)?;
                self.served(1.0, course)
            }
            Decision::Retire => self.refused(&["retire", "fm", first], course),
            Decision::RollBack => {
                self.well(&["rollback", "expert", EXPERT], course)?;
                self.served(0.5, course)
            }
            Decision::RollBackWhole => {
                self.well(&["rollback", "expert", EXPERT], course)?;
                self.served(0.0, course)
            }
        }
    }

    /// Waits for a trainer's first publication; the fleet is free meanwhile.
    fn published(&self, version: &str) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !self.fleet().has_said(&trainer(version), PUBLISHED)? {
            if Instant::now() > until || self.stop.is_requested() {
                return Err(Error::invalid(format!(
                    "expert {EXPERT} {version} has published nothing within {PATIENCE:?}"
                )));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Waits until the daemon gives the second version that share of users.
    fn served(&self, share: f64, course: &Course) -> Result<()> {
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
            if asked.elapsed() > PATIENCE || self.stop.is_requested() {
                return Err(Error::invalid(format!(
                    "the daemon does not serve what was decided: {}",
                    live["problem"]
                )));
            }
            std::thread::sleep(LOOK_EVERY);
        }
        let mut notes = course.notes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(note) = notes.last_mut() {
            note.served_s = asked.elapsed().as_secs_f64();
            println!("  served so after {:.1} s", note.served_s);
        }
        Ok(())
    }

    fn well(&self, words: &[&str], course: &Course) -> Result<()> {
        let said = versions(self.ground, &self.fleet(), words)?;
        self.note(words, None, course);
        match said {
            Ok(table) => {
                table.lines().for_each(|line| println!("  {line}"));
                Ok(())
            }
            Err(why) => {
                Err(Error::invalid(format!("hypercast versions {}: {why}", words.join(" "))))
            }
        }
    }

    fn refused(&self, words: &[&str], course: &Course) -> Result<()> {
        match versions(self.ground, &self.fleet(), words)? {
            Err(why) => {
                self.note(words, Some(why.clone()), course);
                println!("  {why}");
                Ok(())
            }
            Ok(_) => Err(Error::invalid(format!(
                "hypercast versions {}: it was not refused",
                words.join(" ")
            ))),
        }
    }

    fn note(&self, words: &[&str], refused: Option<String>, course: &Course) {
        let command = format!("hypercast versions {}", words.join(" "));
        println!("\n$ {command}");
        let note = Note { command, refused, served_s: 0.0 };
        course.notes.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    fn fleet(&self) -> std::sync::MutexGuard<'_, Fleet> {
        self.fleet.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a trainer says when it has published.
pub const PUBLISHED: &str = "\"kind\":\"published\"";

/// The name of a version's trainer.
pub fn trainer(version: &str) -> String {
    format!("train-{EXPERT}-{version}")
}

/// Starts the trainer of a version of the expert, which learns with the FM of the same version.
///
/// # Errors
/// A process that cannot be started.
pub fn start_expert(ground: &Ground, fleet: &mut Fleet, version: &str) -> Result<()> {
    let words = ["train", "expert", EXPERT, "--follow", "--version", version, "--fm", version];
    let mut args: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
    args.extend([OsStr::new("--config"), ground.first.as_os_str()]);
    fleet.start(&trainer(version), &args)
}

/// Runs `hypercast versions`: the table, or why it is refused.
fn versions(
    ground: &Ground,
    fleet: &Fleet,
    words: &[&str],
) -> Result<std::result::Result<String, String>> {
    let mut args = vec![OsStr::new("versions")];
    args.extend(words.iter().map(OsStr::new));
    args.extend([OsStr::new("--config"), ground.first.as_os_str()]);
    let (well, said) = fleet.ask(&args)?;
    Ok(if well { Ok(said) } else { Err(said) })
}
