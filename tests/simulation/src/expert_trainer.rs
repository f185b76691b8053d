//! The trainer of an expert that follows the feature logs: the host's own, with an expert that
//! notes what it learns. Over the line of its saves it learns from each row once and in their
//! order, or sets it aside; what it published is what it had learned by then.

use std::{io, path::Path, sync::Arc, time::Duration};

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::logs::{LogFollower, LogPosition};
use hypercast_stream::{
    dead_letters::{self, FEATURE_LOGS},
    streams::{StreamEngine, Topic},
};
use hypercast_train::follow_expert::{
    ExpertCheckpoint, ExpertFollower, ExpertServices, FeedPosition, FollowExpertOptions,
};

use crate::{
    expert_model::{ExpertNotes, NotingExperts, past_key},
    installation::{Life, config, dataset, engine},
    model::RecordKey,
    plan::{FaultKind, Role},
    plant::Plant,
    publications::{NamedWeights, ServedWeights},
    trainer,
    world::Simulation,
};

/// The expert that is trained.
pub const NAME: &str = "ranker";

/// The version of it.
pub const VERSION: &str = "0.1.0";

/// The surface whose rows it learns from.
pub const SURFACE: &str = "feed";

/// How long it is left alone once the logs are complete, until it stands where it stood.
const QUIET: Duration = Duration::from_secs(20);

/// The stream of its weights.
pub fn topic() -> Topic {
    Topic::expert(NAME, VERSION)
}

/// The weights that its trainer published.
#[derive(Default)]
pub struct ExpertLedger {
    /// Those that it began to publish, with the rows that they had learned from.
    begun: Vec<(NamedWeights, Vec<u64>)>,
    /// The number of those that were the last to be surely published.
    last: Option<usize>,
    /// What the trainer had learned that went on last.
    pub resumed: Option<ExpertNotes>,
}

impl ExpertLedger {
    /// Whether its trainer had these weights when it published.
    pub fn has(&self, weights: &NamedWeights) -> bool {
        self.begun.iter().any(|(begun, _)| begun == weights)
    }

    /// Notes what it begins to publish.
    pub fn begin(&mut self, weights: NamedWeights, rows: Vec<u64>) {
        self.begun.push((weights, rows));
    }
}

/// A trainer in one of its lives.
pub struct SteppedExpert {
    follower: ExpertFollower<'static>,
    published: u64,
}

fn entry() -> ExpertEntry {
    let text = format!("name = {NAME:?}\nplugin = \"/plugin.wasm\"\nsurfaces = [{SURFACE:?}]");
    toml::from_str(&text).expect("an entry")
}

impl SteppedExpert {
    /// Goes on where it was saved.
    ///
    /// # Errors
    /// What it would say before it ends.
    pub fn open(
        engine: Arc<dyn StreamEngine>,
        config: &Config,
        plant: Option<Plant>,
    ) -> Result<SteppedExpert, String> {
        let options =
            FollowExpertOptions { version: Some(VERSION.into()), ..FollowExpertOptions::default() };
        let runtime = Box::new(NotingExperts { plant });
        let services = ExpertServices { dataset: dataset(), engine, runtime };
        let opened =
            ExpertFollower::open(services, config, &entry(), &options, &Shutdown::default());
        let follower = opened.map_err(|error| error.to_string())?;
        Ok(SteppedExpert { follower, published: 0 })
    }

    /// Does what is to be done now, and says whether it read something.
    ///
    /// # Errors
    /// What it says before it ends.
    pub fn step(&mut self) -> Result<bool, String> {
        let before = self.place();
        let stepped = self.follower.step(Duration::ZERO, &mut io::sink());
        stepped.map_err(|error| error.to_string())?;
        let after = self.follower.report();
        if after.published > self.published {
            self.published = after.published;
            note_published();
        }
        Ok(after.place != before)
    }

    /// Where it stands; none before it has begun.
    pub fn place(&self) -> Option<ExpertCheckpoint> {
        self.follower.report().place
    }

    /// Ends it in order: it saves and publishes.
    ///
    /// # Errors
    /// It cannot save or publish, and says why.
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
    let expert = &mut world.ledger.borrow_mut().expert;
    expert.last = expert.begun.len().checked_sub(1);
}

/// A row of the logs.
struct FollowedRow {
    /// Where a follower stands before it reads the row.
    position: LogPosition,
    past_key: u64,
    key: u64,
    is_correction: bool,
}

/// Holds what the trainer learned from against the logs, which are complete, once it has read them
/// and ended in order.
pub fn check(world: &Simulation) {
    let (at, process) = world.process(Role::ExpertTrainer);
    let place = || process.life.borrow().as_ref().and_then(Life::expert_place);
    loop {
        let before = place();
        world.run_until(world.timeline.now.get() + QUIET);
        if place() == before {
            break;
        }
    }
    if !world.finish(at) {
        return;
    }
    let config = config(&world.plan);
    let oracle = "expert learned once";
    world.ledger.borrow_mut().expert.resumed = None;
    let read = world.observe(&process.machine, || {
        let rows = read_rows(&config.paths.logs)?;
        let engine = engine(&world.plan, 2, None)?;
        let letters = dead_letters::list(&*engine).map_err(|error| error.to_string())?;
        // What goes on is what was saved.
        let saved = SteppedExpert::open(engine, &config, None)?.place();
        Ok::<_, String>((rows, letters.letters, saved))
    });
    let (mut rows, letters, saved) = match read {
        Ok(rows) => rows,
        Err(error) => return world.violate(oracle, error),
    };
    let notes = world.ledger.borrow_mut().expert.resumed.take();
    let Some((notes, FeedPosition::Logs(end))) = notes.zip(saved.map(|saved| saved.position))
    else {
        // Corrections alone are no past.
        if rows.iter().any(|row| !row.is_correction) {
            world.violate(oracle, format!("of {} rows it learned nothing", rows.len()));
        }
        return;
    };
    // Corrections wait for a row with which they are learned from.
    let waiting = rows.split_off(rows.partition_point(|row| row.position < end));
    if let Some(row) = waiting.iter().find(|row| !row.is_correction) {
        world.violate(oracle, format!("{:?} was left out", row.position));
    }
    let is_restored =
        world.plan.faults.iter().any(|fault| matches!(fault.kind, FaultKind::RestoredState { .. }));
    let is_aside = |row: &FollowedRow| {
        letters.iter().map(|listed| &listed.letter).any(|letter| {
            letter.reader == topic().name()
                && letter.source == FEATURE_LOGS
                && letter.position == row.position.number()
        })
    };
    let mut expected = Vec::new();
    for row in &rows {
        let is_past = row.position.file < notes.past_end;
        let is_harmful = !is_past && RecordKey::is_harmful(row.key);
        // Letters name a row by its place in the logs, which a restored disk gives to another one.
        if is_aside(row) != is_harmful && !is_restored {
            let position = row.position;
            world.violate(oracle, format!("{position:?} is harmful: {is_harmful}, or is aside"));
        }
        match (is_past, row.is_correction) {
            (true, true) => {}
            (true, false) => expected.push(row.past_key),
            (false, _) if is_harmful => {}
            (false, _) => expected.push(row.key),
        }
    }
    // A step takes corrections behind its other rows.
    let sorted = |keys: &[u64]| {
        let mut keys = keys.to_vec();
        keys.sort_unstable();
        keys
    };
    if sorted(&notes.rows) != sorted(&expected) {
        let (learned, logged) = (notes.rows.len(), expected.len());
        world.violate(oracle, format!("it learned from {learned} rows, not from {logged}"));
    }
    check_publications(world, &notes, is_restored);
}

/// What was surely published last is what the saves had learned by then; who follows the weights
/// has those that were published.
fn check_publications(world: &Simulation, notes: &ExpertNotes, is_restored: bool) {
    let oracle = "expert publications";
    let served = world.observe(&world.processes[2].machine, || {
        let mut served = ServedWeights::open(engine(&world.plan, 2, None)?, topic())?;
        served.step();
        Ok::<_, String>(served.weights)
    });
    let served = match served {
        Ok(served) => served,
        Err(error) => return world.violate(oracle, error),
    };
    let ledger = world.ledger.borrow();
    let expert = &ledger.expert;
    let at = expert.begun.iter().rposition(|(weights, _)| served.as_ref() == Some(weights));
    let is_late = at < expert.last;
    let learned = expert.last.map_or(&[][..], |last| &expert.begun[last].1);
    let is_lost = !notes.rows.starts_with(learned) && !is_restored;
    drop(ledger);
    if is_late {
        world.violate(oracle, format!("who follows them has number {at:?}"));
    }
    if is_lost {
        world.violate(oracle, "the saves do not have what was published".into());
    }
}

/// All rows of the logs from which the expert learns.
fn read_rows(logs: &Path) -> Result<Vec<FollowedRow>, String> {
    let told = |error: hypercast_data::Error| error.to_string();
    let surface = dataset().schema.surface(SURFACE).expect("it is in the schema");
    let mut rows = Vec::new();
    let mut follower =
        LogFollower::open(logs, trainer::VERSION, LogPosition::default()).map_err(told)?;
    while let Some(logged) = follower.next_request().map_err(told)? {
        if logged.example.surface != surface || logged.example.targets.is_empty() {
            continue;
        }
        let LogPosition { file, row } = follower.position();
        rows.push(FollowedRow {
            position: LogPosition { file, row: row - 1 },
            past_key: past_key(&logged.example),
            key: RecordKey::of(&logged.example, false),
            is_correction: logged.correction,
        });
    }
    Ok(rows)
}
