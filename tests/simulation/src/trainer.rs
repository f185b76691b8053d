//! The FM's trainer that follows `joined`: the host's own, with models that note what they learn.
//! Over the line of its saves, each record is learned from once, or is a dead letter.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    sync::Arc,
    time::Duration,
};

use hypercast_config::Config;
use hypercast_core::shutdown::Shutdown;
use hypercast_stream::{
    dead_letters::DeadLetter,
    join::JoinedRecord,
    streams::{StreamEngine, StreamPlace, StreamRecord, Topic},
};
use hypercast_train::{
    ServiceContext,
    follow_fm::{self, FmFollower, FollowFmOptions},
};

use crate::{
    installation::{config, dataset},
    model::{NotingRuntime, RecordKey, saved_records},
    plan::Role,
    plant::Plant,
    world::Simulation,
};

/// The version that is trained.
pub const VERSION: &str = "0.1.0";

/// A trainer in one of its lives.
pub struct SteppedTrainer {
    follower: FmFollower,
    published: u64,
}

impl SteppedTrainer {
    /// Goes on where it was saved.
    ///
    /// # Errors
    /// What it would say before it ends.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        plant: Option<Plant>,
    ) -> Result<SteppedTrainer, String> {
        let options = FollowFmOptions {
            version: VERSION.into(),
            from: None,
            metrics: None,
            until_end: false,
        };
        let context = ServiceContext { dataset: dataset(), config, engine };
        let runtime = Arc::new(NotingRuntime { plant });
        let opened = FmFollower::open(context, &options, runtime, &Shutdown::default());
        let follower = opened.map_err(|error| error.to_string())?;
        Ok(SteppedTrainer { follower, published: 0 })
    }

    /// Does what is to be done now, and says whether it learned from something.
    ///
    /// # Errors
    /// What it says before it ends.
    pub fn step(&mut self) -> Result<bool, String> {
        let before = self.follower.report();
        let stepped = self.follower.step(Duration::ZERO, &mut io::sink());
        stepped.map_err(|error| error.to_string())?;
        let after = self.follower.report();
        if after.published > self.published {
            self.published = after.published;
            note_published();
        }
        Ok(after.position > before.position)
    }

    /// Ends it in order: it saves and publishes.
    ///
    /// # Errors
    /// It cannot.
    pub fn stop(self) -> Result<(), String> {
        let report = self.follower.finish(&mut io::sink()).map_err(|error| error.to_string())?;
        if report.published > self.published {
            note_published();
        }
        Ok(())
    }
}

/// Notes that the newest weights are surely stored.
fn note_published() {
    let world = Simulation::current();
    let mut ledger = world.ledger.borrow_mut();
    ledger.last_published = ledger.published.len().checked_sub(1);
}

/// Holds what the trainer learned from against `joined`, once it has ended in order.
pub fn check(world: &Simulation, joined: &[StreamRecord], letters: &[DeadLetter]) {
    let (at, process) = world.process(Role::Trainer);
    if !world.finish(at) {
        return;
    }
    let saved = follow_fm::work_dir(&config(&world.plan), VERSION).join("saved/trainer");
    let learned = match world.observe(&process.machine, || saved_records(&saved)) {
        Ok(learned) => learned,
        Err(error) => return world.violate("learned once", error.to_string()),
    };
    let topic = Topic::fm(VERSION);
    let is_own = |letter: &&DeadLetter| letter.reader == topic.name() && letter.source == "joined";
    let place_of = |letter: &DeadLetter| StreamPlace {
        position: letter.position + 1,
        checksum: letter.checksum,
    };
    let set_aside: Vec<StreamPlace> = letters.iter().filter(is_own).map(place_of).collect();
    let mut left = KeyCounts::new(world);
    learned.into_iter().for_each(|key| left.came(key));
    for record in joined {
        let Some(JoinedKey { key, .. }) = JoinedKey::of(record) else { continue };
        let (position, is_harmful) = (record.position, RecordKey::is_harmful(key));
        let is_aside = set_aside.contains(&StreamPlace::after(record));
        if is_aside && !is_harmful || is_harmful && !is_aside && !left.lost.contains(&position) {
            world.violate("learned once", format!("joined {position} is aside: {is_aside}"));
        }
        if !is_harmful {
            left.expect(key, position);
        }
    }
    left.tell(world, "learned once");
}

/// What the oracles need of a joined record.
pub struct JoinedKey {
    /// By which it is known in saves and logs.
    pub key: u64,
    /// Whether it has something to log.
    pub has_targets: bool,
}

impl JoinedKey {
    /// Of a record; none if it cannot be read.
    pub fn of(record: &StreamRecord) -> Option<JoinedKey> {
        let joined = JoinedRecord::decode(&record.payload).ok()?;
        let is_correction = matches!(joined, JoinedRecord::Correction(_));
        let example = &joined.joined()?.example;
        let key = RecordKey::of(example, is_correction);
        Some(JoinedKey { key, has_targets: !example.targets.is_empty() })
    }
}

/// How often records came to a reader of `joined`, beside how often they should.
pub struct KeyCounts {
    /// By key. Above 0 if it came more often.
    left: BTreeMap<u64, i64>,
    /// Records that may have come, since the server lost them.
    may_come: BTreeMap<u64, i64>,
    /// The positions that the server lost.
    lost: Vec<u64>,
    /// How often a record may come again, because its reader went back.
    again: i64,
    /// The keys of those that a reader must not pass in silence.
    lost_keys: BTreeSet<u64>,
}

impl KeyCounts {
    /// Of a reader to which nothing came.
    pub fn new(world: &Simulation) -> KeyCounts {
        let ledger = world.ledger.borrow();
        let lost = ledger.lost_joined.iter().map(|record| record.position).collect();
        let (left, may_come, lost_keys) = Default::default();
        let mut counts = KeyCounts { left, may_come, lost, lost_keys, again: ledger.cuts as i64 };
        let cut = ledger.cut_joined.iter().filter_map(JoinedKey::of);
        cut.for_each(|record| counts.allow(record.key));
        counts
    }

    /// Notes that a record came.
    pub fn came(&mut self, key: u64) {
        *self.left.entry(key).or_default() += 1;
    }

    /// Notes that the record at a position should come once, if the server has not lost it.
    pub fn expect(&mut self, key: u64, position: u64) {
        if self.lost.contains(&position) {
            self.allow(key);
            self.lost_keys.insert(key);
        } else {
            *self.left.entry(key).or_default() -= 1;
        }
    }

    /// Notes that a record may come once.
    pub fn allow(&mut self, key: u64) {
        *self.may_come.entry(key).or_default() += 1;
        self.left.entry(key).or_default();
    }

    /// Tells what came too often, or not at all.
    pub fn tell(self, world: &Simulation, oracle: &'static str) {
        for (key, count) in self.left {
            let may_come = self.may_come.get(&key).copied().unwrap_or(0);
            if !(0..=may_come + self.again).contains(&count) {
                world.violate(oracle, format!("record {key:016x} came {count:+} times too often"));
            }
            if count < may_come && self.lost_keys.contains(&key) && !world.gaps_accepted.get() {
                world.violate(oracle, format!("a gap at record {key:016x} was passed untold"));
            }
        }
    }
}
