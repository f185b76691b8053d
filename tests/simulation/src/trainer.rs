//! The FM's trainer that follows `joined`: the host's own, with models that note what they learn.
//! Over the line of its saves, each record is learned from once, or is a dead letter.

use std::{collections::BTreeMap, io, sync::Arc, time::Duration};

use hypercast_config::Config;
use hypercast_core::shutdown::Shutdown;
use hypercast_stream::{
    dead_letters::DeadLetter,
    join::JoinedRecord,
    streams::{StreamEngine, StreamRecord, Topic},
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
    let set_aside: Vec<u64> = letters.iter().filter(is_own).map(|own| own.position).collect();
    let mut left: BTreeMap<u64, i64> = BTreeMap::new();
    for key in learned {
        *left.entry(key).or_default() += 1;
    }
    for record in joined {
        let Ok(decoded) = JoinedRecord::decode(&record.payload) else { continue };
        let is_correction = matches!(decoded, JoinedRecord::Correction(_));
        let key = RecordKey::of(&decoded.joined().example, is_correction);
        let is_aside = set_aside.contains(&record.position);
        if is_aside != RecordKey::is_harmful(key) {
            let position = record.position;
            world.violate("learned once", format!("joined {position} is aside: {is_aside}"));
        }
        *left.entry(key).or_default() -= i64::from(!is_aside);
    }
    for (key, count) in left.into_iter().filter(|&(_, count)| count != 0) {
        world.violate("learned once", format!("record {key:016x} is learned {count:+} times"));
    }
}
