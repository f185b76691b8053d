//! How much processes do: their operations and bytes on disks, their calls of the stream engine and
//! the records that these give. It must be in proportion to the events and to how often processes
//! were started, whatever a run is.
//!
//! Three bounds hold it. A life of a process reads each record once, but for what it cannot know to
//! be in its saved state. All lives together do at most so much for each event, step and start.
//! And without faults, twice the requests cost at most little more than twice as much.

use std::{collections::BTreeMap, ops::Range, sync::Arc, time::Duration};

use hypercast_stream::{
    Error, Result,
    events::EventKind,
    streams::{Appender, Reader, StreamEngine, StreamPlace, StreamRecord, Topic},
};

use crate::{
    installation::Life,
    plan::{Plan, ROLES, Role},
    plant::Plant,
    world::{Process, Simulation},
};

/// What a process did on its disk.
#[derive(Debug, Clone, Copy, Default)]
pub struct DiskWork {
    /// Operations of any kind.
    pub operations: u64,
    /// Bytes of streams that were read.
    pub read_bytes: u64,
    /// Bytes that were written, but for files that replace others as a whole.
    pub written_bytes: u64,
    /// Files and folders that were replaced.
    pub replaced: u64,
}

impl DiskWork {
    /// With what was done besides.
    #[must_use]
    pub fn and(self, other: DiskWork) -> DiskWork {
        DiskWork {
            operations: self.operations + other.operations,
            read_bytes: self.read_bytes + other.read_bytes,
            written_bytes: self.written_bytes + other.written_bytes,
            replaced: self.replaced + other.replaced,
        }
    }
}

/// What one life of a process did with one stream.
#[derive(Debug, Clone, Copy, Default)]
struct TopicWork {
    /// Records that it was given.
    records: u64,
    /// The position after the furthest one.
    reached: u64,
    /// Whether it was told that records are missing: then it may read from anywhere.
    has_gap: bool,
}

/// What a process did with streams, and how far its saved states surely are.
#[derive(Debug, Clone, Default)]
pub struct StreamWork {
    /// Calls of the engine, in all lives.
    calls: u64,
    /// Records in all lives before this one.
    records: u64,
    /// Their bytes, in all lives.
    bytes: u64,
    life: BTreeMap<Topic, TopicWork>,
    /// How far it needs not read again.
    saved: SavedPlaces,
    /// The same when this life began.
    begun: SavedPlaces,
    /// How often its disk had failed when a step ended last.
    failures: u64,
    /// The outcome with which features are saved again after such a failure.
    next_save: u64,
}

/// Positions before which a saved state has all records.
#[derive(Debug, Clone, Copy, Default)]
struct SavedPlaces {
    events: u64,
    outcomes: u64,
}

impl StreamWork {
    /// A life begins: what was saved by now it need not read.
    pub fn begin_life(&mut self) {
        self.begun = self.saved;
    }

    /// A state was damaged, removed or replaced by an older one.
    pub fn forget_saved(&mut self) {
        self.saved = SavedPlaces::default();
    }

    /// A step went well: whatever was to be saved in it was saved. A follower of outcomes goes on
    /// without, so a failure of its disk in the step may have cost it a state of all that it had
    /// read in one go, and the next one comes after as many outcomes as every one.
    pub fn step_ended(&mut self, life: &Life, plan: &Plan, failures: u64) {
        let every = plan.settings.save_every_events;
        if let Some(joined) = life.joined() {
            self.saved.events = joined.saturating_sub(every);
        }
        if let Some(features) = life.features() {
            let applied = *features.live.applied.borrow();
            if std::mem::replace(&mut self.failures, failures) < failures {
                self.next_save = applied + every;
            }
            if applied >= self.next_save {
                self.saved.outcomes = applied.saturating_sub(every);
            }
        }
    }

    /// A life ended; returns what it read too much.
    pub fn end_life(&mut self, role: Role, plan: &Plan) -> Option<String> {
        let in_daemon = plan.settings.join_in_daemon;
        let joins = match role {
            Role::Daemon => in_daemon,
            Role::Joiner | Role::SecondJoiner => true,
            _ => false,
        };
        let mut excess = None;
        for (topic, work) in std::mem::take(&mut self.life) {
            self.records += work.records;
            let from = match () {
                () if topic == Topic::events() && joins => self.begun.events,
                // A joiner compares what it makes with outcomes besides.
                () if topic == Topic::outcomes() && role == Role::Daemon && !joins => {
                    self.begun.outcomes
                }
                () => 0,
            };
            let once = work.reached.saturating_sub(from);
            // Who has no state may read a stream to see what it is to go on with.
            let allowed = if from > 0 { once } else { UNSAVED_READS * once };
            if work.records > allowed + SPARE_RECORDS && !work.has_gap {
                excess = Some(format!(
                    "{role:?} read {} records of {topic}, and had to read {allowed}: from {from} \
                     to {}",
                    work.records, work.reached
                ));
            }
        }
        excess
    }

    fn note(&mut self, topic: &Topic, read: &Result<Vec<StreamRecord>>) {
        let payload = |record: &StreamRecord| HEADER_BYTES + record.payload.len() as u64;
        self.bytes += read.iter().flatten().map(payload).sum::<u64>();
        let work = self.life.entry(topic.clone()).or_default();
        work.has_gap |= matches!(read, Err(Error::Gap(_)));
        if let Ok(read) = read {
            work.records += read.len() as u64;
            let reached = read.last().map_or(0, |last| last.position + 1);
            work.reached = work.reached.max(reached);
        }
    }
}

/// How often a process may read a stream of which it has no state: a joiner compares what its
/// outputs have by two rules, then reads the events.
const UNSAVED_READS: u64 = 4;

/// What a segment has of a record besides its payload.
const HEADER_BYTES: u64 = 20;

/// Records that a life may read besides, to see where a stream ends.
const SPARE_RECORDS: u64 = 8;

/// The engine of a process, which counts what it is asked.
pub struct CountedEngine {
    /// What does it.
    pub engine: Arc<dyn StreamEngine>,
    /// The number of the process.
    pub process: usize,
}

impl CountedEngine {
    fn call(&self) {
        note(self.process, |work| work.calls += 1);
    }

    fn reader(&self, topic: &Topic, place: StreamPlace) -> Result<CountedReader> {
        let reader = self.engine.resume(topic, place)?;
        Ok(CountedReader { reader, topic: topic.clone(), process: self.process })
    }

    /// What a planted fault does: it reads what was read before.
    fn read_again(&self, topic: &Topic, records: Range<u64>) -> Result<()> {
        let mut reader = self.reader(topic, StreamPlace::at(records.start))?;
        while reader.position() < records.end {
            if reader.next(records.end as usize, Duration::ZERO)?.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

impl StreamEngine for CountedEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.call();
        self.engine.appender(topic)
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        self.call();
        let engine = CountedEngine { engine: self.engine.clone(), process: self.process };
        let plant = Simulation::current().plant;
        if plant == Some(Plant::ReadAgainAtStart) && *topic == Topic::events() {
            // The stream may have lost these records; whoever asks is told with the next read.
            let _ = engine.read_again(topic, 0..place.position);
        }
        let reader = engine.reader(topic, place)?;
        if plant == Some(Plant::ReadAgainAtSteps) {
            return Ok(Box::new(RepeatingReader { reader, engine }));
        }
        Ok(Box::new(reader))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        self.call();
        self.engine.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.call();
        self.engine.trim(topic, before)
    }

    fn is_stopping(&self) -> bool {
        self.engine.is_stopping()
    }
}

struct CountedReader {
    reader: Box<dyn Reader>,
    topic: Topic,
    process: usize,
}

impl Reader for CountedReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let read = self.reader.next(most, wait);
        note(self.process, |work| {
            work.calls += 1;
            work.note(&self.topic, &read);
        });
        read
    }

    fn position(&self) -> u64 {
        self.reader.position()
    }
}

/// A planted fault: after each read it reads all that was read before.
struct RepeatingReader {
    reader: CountedReader,
    engine: CountedEngine,
}

impl Reader for RepeatingReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let read = self.reader.next(most, wait)?;
        if let Some(first) = read.first() {
            let _ = self.engine.read_again(&self.reader.topic, 0..first.position);
        }
        Ok(read)
    }

    fn position(&self) -> u64 {
        self.reader.position()
    }
}

fn note(process: usize, change: impl FnOnce(&mut StreamWork)) {
    change(&mut Simulation::current().processes[process].streams.borrow_mut());
}

/// What a process did, by what is counted.
const MEASURES: [&str; 6] =
    ["operations", "bytes read", "bytes written", "files replaced", "engine calls", "records read"];

fn measured(process: &Process) -> [u64; 6] {
    let (host, streams) = (process.host.borrow(), process.streams.borrow());
    let life = host.as_ref().map_or(DiskWork::default(), |host| host.work.get());
    let DiskWork { operations, read_bytes, written_bytes, replaced } = process.work.get().and(life);
    let now = streams.life.values().map(|work| work.records).sum::<u64>();
    let records = streams.records + now;
    [operations, read_bytes, written_bytes, replaced, streams.calls, records]
}

/// How much a process may do of each of [`MEASURES`], in proportion to its steps, its starts, and
/// the events and outcomes. The numbers were found in runs that keep all other promises, and
/// doubled.
fn allowed(world: &Simulation, process: &Process, events: u64) -> [u64; 6] {
    let (steps, starts) = (process.steps.get(), process.lives.get());
    let settings = &world.plan.settings;
    // Who writes to a stream reads its newest segment at first, and the ids that it remembers. A
    // reader finds its place in a segment. Neither depends on how long a stream is.
    let opened = 10_000 + 4 * settings.segment_bytes + 100 * settings.remembered_ids as u64;
    let looked = 50 + settings.segment_bytes / 20;
    let given = process.streams.borrow().bytes;
    // A joiner saves its state every so many events, and who follows outcomes does.
    let saves = events * 3 / (settings.save_every_events * 2) + tier_files(world, process, events);
    [
        20 * steps + 1000 * starts + 20 * events,
        looked * steps + opened * starts + 2 * given,
        50 * steps + 2000 * starts + 250 * events,
        20 * starts + saves,
        10 * steps + 100 * starts + 5 * events,
        // Who lost its state reads again; that others do not is held for each life.
        steps + 100 * starts + UNSAVED_READS * events * starts,
    ]
}

/// Files that a trainer, a logging tier or a daemon with experts may replace besides.
fn tier_files(world: &Simulation, process: &Process, events: u64) -> u64 {
    let (tiers, seconds) = (&world.plan.settings.tiers, world.timeline.now.get().as_secs());
    match process.role {
        // It saves four files with each publication, which has a work folder, and every so many
        // requests.
        Role::Trainer => 8 * (seconds / tiers.publish_every_s + events / tiers.save_every_requests),
        // A save, a publication with its work folder and the word of its gate.
        Role::ExpertTrainer => 8 * (seconds / tiers.publish_every_s) + events,
        // Two tables a file.
        Role::LoggingTier => {
            4 * (seconds / tiers.file_seconds + events / tiers.rows_per_file as u64)
        }
        // A rollout's file has how long its step has lasted, and each of its steps.
        Role::ExpertDaemon | Role::SecondExpertDaemon => {
            seconds / 10 + 20 * world.plan.pushes.len() as u64
        }
        _ => 0,
    }
}

/// Holds the work of every process against its steps, its starts, and the events and outcomes.
pub fn check(world: &Simulation, events: u64) {
    for process in &world.processes {
        let allowed = allowed(world, process, events);
        for ((what, done), allowed) in MEASURES.into_iter().zip(measured(process)).zip(allowed) {
            if done > allowed {
                let role = process.role;
                world.violate("work", format!("{role:?}: {done} {what}, {allowed} are allowed"));
            }
        }
    }
}

/// One seed in so many is also run without faults, with its requests and with twice as many.
const GROWN: u64 = 16;

/// How much more than in proportion the work may grow, in percent, and besides in operations or
/// calls, or in bytes. Work that grows with the square would grow by 100 percent more.
const GROWTH_PERCENT: u64 = 30;
const SPARE: u64 = 20;
const SPARE_BYTES: u64 = 2000;

fn rows(kind: &EventKind) -> u64 {
    match kind {
        EventKind::CompleteRequest(rows) => rows.len() as u64,
        _ => 1,
    }
}

/// Holds the work for twice the requests against that for the requests of a plan.
pub fn check_growth(world: &Simulation) {
    if !world.plan.seed.is_multiple_of(GROWN) {
        return;
    }
    let once = Plan { faults: Vec::new(), ..world.plan.clone() };
    let shift = once.requests.iter().max().map_or(0, |last| last + 1);
    let more = once.requests.iter().map(|number| number + shift);
    let requests = once.requests.iter().copied().chain(more).collect();
    let twice = Plan { requests, ..once.clone() };
    let [once, twice] = [once, twice].map(|plan| Simulation::run_alone(&plan, world.plant, false));
    let [few, many] = [&once, &twice].map(|world| {
        let events = world.calls.iter().flat_map(|call| &call.events);
        events.map(|event| rows(&event.kind)).sum::<u64>().max(1)
    });
    for (at, role) in ROLES.into_iter().enumerate() {
        let [once, twice] = [&once, &twice].map(|world| measured(&world.processes[at]));
        for ((what, once), twice) in MEASURES.into_iter().zip(once).zip(twice) {
            let allowed = once * many * (100 + GROWTH_PERCENT) / (few * 100);
            // A publication more or less is much of the bytes that these read. Records hold them.
            let is_exempt = match role {
                Role::Trainer | Role::LoggingTier => what == "bytes read",
                // It begins late, and holds some of what it learned.
                Role::ExpertTrainer => what.starts_with("bytes"),
                _ => false,
            };
            let spare = if what.starts_with("bytes") { SPARE_BYTES } else { SPARE };
            if twice > allowed + spare && !is_exempt {
                world.violate(
                    "work grows",
                    format!(
                        "{role:?}: {once} {what} for {few} events, and {twice} for {many}; {allowed} \
                         are allowed"
                    ),
                );
            }
        }
    }
}
