//! The joiner at work: events from their stream, what it makes to its streams,
//! each record once.
//!
//! How many records its streams hold says how far it got. A joiner that starts
//! again goes on from its saved state, makes what it made before anew and passes
//! over as many records as are there, so no two streams need to change together.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde::Serialize;

use super::{Folder, Joined, Joiner, Options, Outcome, core::Sink, saved::SavedJoiner};
use crate::{
    config::Config,
    dataset::Dataset,
    engine::{Appender, Engine, MAX_RECORD_BYTES, Reader, Record, Topic},
    error::{Error, Result},
    features::FeatureState,
    ingest::Fact,
    serve::metrics::Metrics,
};

/// Events that are read together.
const READ: usize = 1024;

/// Records, and bytes of them, that are appended together.
const WRITE: (usize, usize) = (1024, 4 << 20);

/// How long to wait for an event before looking whether to stop.
const IDLE: Duration = Duration::from_millis(100);

/// The longest pause before an engine that failed is asked again.
const PAUSE: Duration = Duration::from_secs(2);

/// How far a joiner is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// The next event.
    pub events: u64,
    /// Where `outcomes` ends, with all that these events led to.
    pub outcomes: u64,
}

/// A joiner with its streams and the folder of its state.
pub struct Runner {
    engine: Arc<dyn Engine>,
    joiner: Joiner,
    reader: Box<dyn Reader>,
    position: u64,
    outputs: Outputs,
    folder: Folder,
    world: String,
    /// What is to be gone by once all that was made before is made again.
    wanted: Option<Options>,
    save_every: u64,
    saved_at: u64,
    looked: Instant,
}

/// Where records go.
struct Outputs {
    joined: Output,
    outcomes: Output,
    metrics: Arc<Metrics>,
    stop: Arc<AtomicBool>,
    failure: Option<Error>,
}

/// One stream that the joiner writes.
struct Output {
    topic: Topic,
    engine: Arc<dyn Engine>,
    appender: Arc<dyn Appender>,
    /// Records made since the first event.
    made: u64,
    /// Records that the stream holds.
    end: u64,
    batch: Vec<Record>,
    bytes: usize,
    ingested_ms: Vec<i64>,
}

impl Runner {
    /// Takes the state's folder and goes on from what is in it; without, from the first event. `stop` ends [`Runner::run`],
    /// and retries of an engine that fails.
    ///
    /// # Errors
    /// A folder or stream that another process holds; a state that does not fit the data set or the streams; events that
    /// are needed and no longer kept.
    pub fn open(
        engine: Arc<dyn Engine>,
        config: &Config,
        dataset: &Dataset,
        metrics: Arc<Metrics>,
        stop: Arc<AtomicBool>,
    ) -> Result<Runner> {
        let folder = Folder::hold(&config.paths.state.join("join"))?;
        let (world, wanted) = (world(dataset, config)?, options(config));
        let outputs = Outputs {
            joined: Output::open(&engine, Topic::joined())?,
            outcomes: Output::open(&engine, Topic::outcomes())?,
            metrics,
            stop,
            failure: None,
        };
        let kept = engine.span(&Topic::events())?;
        let bare = dataset.without_content();
        let (joiner, position) = match folder.read::<SavedJoiner>()? {
            Some(saved) => {
                refuse_other(&world, &saved, folder.dir())?;
                let position = saved.position;
                let state = FeatureState::new(&bare, config.features);
                (Joiner::restore(state, saved)?, position)
            }
            None => {
                let until_ms = config.timeline.until_ms()?;
                let state = FeatureState::rebuild(&bare, config.features, until_ms)?;
                let begun = outputs.joined.end + outputs.outcomes.end > 0;
                (Joiner::new(state, wanted.clone()), if begun { 0 } else { kept.start })
            }
        };
        if position < kept.start || position > kept.end {
            return Err(Error::Invalid(format!(
                "the joiner is at event {position}, but the events stream holds {kept:?}; both must be kept together: restore {} or the stream, or begin anew without either",
                folder.dir().display()
            )));
        }
        let mut runner = Runner {
            reader: engine.reader(&Topic::events(), position)?,
            wanted: Some(wanted).filter(|wanted| wanted != joiner.options()),
            engine,
            position,
            outputs,
            folder,
            world,
            save_every: config.join.save_every_events,
            saved_at: position,
            looked: Instant::now(),
            joiner,
        };
        runner.outputs.begin(&runner.joiner)?;
        runner.adopt()?;
        // What it goes by is written before anything is made by it.
        runner.save()?;
        Ok(runner)
    }

    /// Joins until it is told to stop, then saves the state. `passed` is told how far it is.
    ///
    /// # Errors
    /// An event that cannot be read, another writer of its streams, a state that cannot be saved.
    pub fn run(mut self, mut passed: impl FnMut(Passed)) -> Result<()> {
        let stop = self.outputs.stop.clone();
        passed(self.passed());
        while !stop.load(Ordering::Relaxed) {
            if self.step(IDLE)? > 0 {
                passed(self.passed());
            }
        }
        self.save()
    }

    /// Takes the next events, as many as are there; waits for the first. How many they were.
    ///
    /// # Errors
    /// As [`Runner::run`].
    pub fn step(&mut self, wait: Duration) -> Result<usize> {
        let stored = match self.reader.next(READ, wait) {
            Ok(stored) => stored,
            Err(error) => {
                self.reopen(error)?;
                return Ok(0);
            }
        };
        for record in &stored {
            let fact = Fact::decode(&record.payload)
                .map_err(|error| Error::Invalid(format!("event {}: {error}", record.position)))?;
            self.joiner.take(fact, &mut self.outputs);
        }
        self.outputs.flush()?;
        if let Some(last) = stored.last() {
            self.position = last.position + 1;
        }
        self.adopt()?;
        if self.position - self.saved_at >= self.save_every {
            self.save()?;
        }
        self.look(stored.is_empty());
        Ok(stored.len())
    }

    /// How far it is.
    pub fn passed(&self) -> Passed {
        Passed { events: self.position, outcomes: self.outputs.outcomes.end }
    }

    /// Writes the state down.
    ///
    /// # Errors
    /// What the file system says.
    pub fn save(&mut self) -> Result<()> {
        let folder = &self.folder;
        self.joiner.save(self.position, &self.world, |saved| folder.write(saved))?;
        self.saved_at = self.position;
        Ok(())
    }

    /// Goes by the options that are wanted as soon as nothing that was made by others is to be made again.
    fn adopt(&mut self) -> Result<()> {
        if self.outputs.joined.made < self.outputs.joined.end
            || self.outputs.outcomes.made < self.outputs.outcomes.end
        {
            return Ok(());
        }
        if let Some(wanted) = self.wanted.take() {
            self.joiner.set_options(wanted);
            self.save()?;
        }
        Ok(())
    }

    /// An engine that was gone for a while is no reason to give up.
    fn reopen(&mut self, error: Error) -> Result<()> {
        tracing::warn!(%error, "events cannot be read; trying again");
        std::thread::sleep(IDLE);
        let kept = self.engine.span(&Topic::events());
        if kept.is_ok_and(|kept| self.position < kept.start) {
            return Err(error);
        }
        if let Ok(reader) = self.engine.reader(&Topic::events(), self.position) {
            self.reader = reader;
        }
        Ok(())
    }

    /// Says how far it is, about once a second.
    fn look(&mut self, idle: bool) {
        if !idle && self.looked.elapsed() < Duration::from_secs(1) {
            return;
        }
        self.looked = Instant::now();
        if let Ok(kept) = self.engine.span(&Topic::events()) {
            let lag = kept.end.saturating_sub(self.position);
            self.outputs.metrics.joiner(self.joiner.counts(), self.joiner.held(), lag);
        }
    }
}

impl Outputs {
    /// Finds where the joiner stands in its streams.
    fn begin(&mut self, joiner: &Joiner) -> Result<()> {
        let counts = joiner.counts();
        let both = [(&mut self.joined, counts.joined), (&mut self.outcomes, counts.outcomes)];
        for (output, made) in both {
            if output.end < made {
                return Err(Error::Invalid(format!(
                    "the joiner made {made} records of stream {}, which holds {}; restore the stream, or begin anew without state and streams",
                    output.topic, output.end
                )));
            }
            output.made = made;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.outcomes_flush();
        self.joined_flush();
        self.failure.take().map_or(Ok(()), Err)
    }

    fn joined_flush(&mut self) {
        let flushed = self.joined.flush("joined", &self.metrics, &self.stop);
        self.failure = self.failure.take().or(flushed.err());
    }

    fn outcomes_flush(&mut self) {
        let flushed = self.outcomes.flush("told", &self.metrics, &self.stop);
        self.failure = self.failure.take().or(flushed.err());
    }
}

impl Sink for Outputs {
    fn joined(&mut self, joined: Joined) {
        if !self.joined.is_new() || self.failure.is_some() {
            return;
        }
        let ingested_ms = joined.joined().ingested_ms;
        match shortened(joined) {
            Ok(payload) => self.joined.push(payload, ingested_ms),
            Err(error) => self.failure = Some(error),
        }
        if self.joined.is_full() {
            self.joined_flush();
        }
    }

    fn outcome(&mut self, outcome: Outcome) {
        if !self.outcomes.is_new() || self.failure.is_some() {
            return;
        }
        match encode(&outcome) {
            Ok(payload) => self.outcomes.push(payload, outcome.ingested_ms),
            Err(error) => self.failure = Some(error),
        }
        if self.outcomes.is_full() {
            self.outcomes_flush();
        }
    }
}

impl Output {
    fn open(engine: &Arc<dyn Engine>, topic: Topic) -> Result<Output> {
        let appender = engine.appender(&topic)?;
        let end = engine.span(&topic)?.end;
        let (engine, batch) = (engine.clone(), Vec::new());
        Ok(Output {
            topic,
            engine,
            appender,
            made: 0,
            end,
            batch,
            bytes: 0,
            ingested_ms: Vec::new(),
        })
    }

    /// Counts a record: whether it is not in the stream yet.
    fn is_new(&mut self) -> bool {
        self.made += 1;
        self.made > self.end
    }

    fn push(&mut self, payload: Vec<u8>, ingested_ms: i64) {
        self.bytes += payload.len();
        self.batch.push(Record { id: 0, payload });
        self.ingested_ms.push(ingested_ms);
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= WRITE.0 || self.bytes >= WRITE.1
    }

    /// Appends what is gathered, however often the engine fails meanwhile, unless the process is to stop.
    fn flush(&mut self, stage: &str, metrics: &Metrics, stop: &AtomicBool) -> Result<()> {
        let mut pause = Duration::from_millis(50);
        let mut unsure = false;
        while !self.batch.is_empty() {
            let error = match self.appender.append_at(self.end, &self.batch) {
                Ok(Some(appended)) => {
                    self.end = appended.end;
                    self.batch.clear();
                    break;
                }
                Ok(None) => None,
                Err(error) => Some(error),
            };
            // Only an attempt that failed can have made the stream longer.
            unsure |= error.is_some();
            if !unsure {
                return Err(self.other_writer());
            }
            // What failed may have been appended all the same.
            match self.engine.span(&self.topic) {
                Ok(kept) => self.found(kept.end)?,
                Err(again) => tracing::warn!(%again, topic = %self.topic, "no answer"),
            }
            let Some(error) = error else { continue };
            if self.batch.is_empty() {
                break;
            }
            if stop.load(Ordering::Relaxed) {
                return Err(error);
            }
            tracing::warn!(%error, topic = %self.topic, "cannot append; trying again");
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE);
        }
        let now = now_ms();
        for ingested_ms in self.ingested_ms.drain(..) {
            metrics.event_latency(stage, now - ingested_ms);
        }
        self.bytes = 0;
        Ok(())
    }

    /// The stream ends here: the first records of the batch are in it if it is longer than it was.
    fn found(&mut self, end: u64) -> Result<()> {
        let there = end.checked_sub(self.end).filter(|&there| there <= self.batch.len() as u64);
        match there {
            Some(there) => {
                self.batch.drain(..there as usize);
                self.end = end;
                Ok(())
            }
            None => Err(self.other_writer()),
        }
    }

    fn other_writer(&self) -> Error {
        Error::Invalid(format!(
            "stream {} does not end at {}, where this joiner left it; another joiner writes to it: stop one",
            self.topic, self.end
        ))
    }
}

/// A joined record, without the oldest half of its history as often as it must be to fit.
fn shortened(mut joined: Joined) -> Result<Vec<u8>> {
    loop {
        let payload = encode(&joined)?;
        if payload.len() <= MAX_RECORD_BYTES {
            return Ok(payload);
        }
        let (Joined::Example(of) | Joined::Correction(of)) = &mut joined;
        let history = &mut of.example.history;
        if history.is_empty() {
            let (request, bytes) = (of.example.request, payload.len());
            return Err(Error::Invalid(format!(
                "request {request} makes a record of {bytes} bytes; at most {MAX_RECORD_BYTES} fit: lower fm.max_targets"
            )));
        }
        tracing::warn!(
            request = of.example.request,
            events = history.len(),
            "a history is too long for a record; its oldest half is left out"
        );
        history.drain(..history.len().div_ceil(2));
    }
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value)
        .map_err(|error| Error::Invalid(format!("a joined record cannot be written: {error}")))
}

/// What the joiner goes by, as it is configured.
pub fn options(config: &Config) -> Options {
    Options {
        settings: config.join.clone(),
        history_len: config.fm.max_history,
        max_targets: config.fm.max_targets,
    }
}

/// What a saved state was made for.
pub(crate) fn world(dataset: &Dataset, config: &Config) -> Result<String> {
    let schema = toml::to_string(&*dataset.schema)
        .map_err(|error| Error::data(&dataset.dir, error.to_string()))?;
    let until = config.timeline.until_ms()?;
    let (rows, hash) = (dataset.rows, crc32fast::hash(schema.as_bytes()));
    Ok(format!("schema {hash:08x}, {rows} impressions, until {until:?}, {:?}", config.features))
}

fn refuse_other(world: &str, saved: &SavedJoiner, dir: &Path) -> Result<()> {
    if saved.world == world {
        return Ok(());
    }
    let why = format!(
        "this state was made over another data set or other [timeline] or [features]: {}; now there is {world}. Go back to those, or move the folder away: joining then begins at the first event again",
        saved.world
    );
    Err(Error::data(dir, why))
}

pub(crate) fn now_ms() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
