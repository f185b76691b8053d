//! The FM's trainer as a service: it learns from the stream of joined examples as it grows,
//! publishes what moved, and saves where it stands.
//!
//! Requests are predicted before they are learned from, in batches as they are there: a full one,
//! or what has come after a short wait. A correction is learned from in the same steps, its changed
//! outcomes alone, and is in no metric. What is saved goes on bit for bit; which records make a
//! batch depends on when they come, so two runs are equal where the records were there. All is
//! saved before the first record, and again where records are missing, so that a trainer that is
//! killed knows where it stood. A publication that is worse than what serves is held (`gate`), and
//! learning goes on; so it does while one is sent, which another thread does (`publication`). It
//! neither joins nor logs, and needs no daemon.

mod checkpoint;
mod gate;
mod progress;
mod publication;
mod report;
mod serving_follower;

use std::{
    collections::VecDeque,
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::{
    example::Example,
    growth::SpecGrowth,
    harm::HARMFUL,
    runtime::{BurnRuntime, FmRuntime},
    spec::FmSpec,
    trainer::{FmTrainer, ResumePaths},
};

pub use self::report::{FmStageTimes, FollowFmReport};
use self::{
    checkpoint::FmCheckpoint,
    gate::{FmPublishGate, TrainedVersion},
    progress::{FmMeters, FmProgress},
    publication::FmPublication,
    report::timed,
};
use super::{
    eval_window::EvalWindow,
    fm::dataset_spec,
    holds::HeldPublications,
    joined_reader::{
        JoinedPosition, JoinedRead, JoinedReader, PassedGap, PositionedExample, RecordKey,
        RecordReports,
    },
    progress_log::{serve_metrics, tell},
};
use crate::ServiceContext;
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_core::clock::{self, now_ms};
use hypercast_core::dir_lock::DirLock;
use hypercast_core::disk;
use hypercast_core::logging::RepeatedFailures;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::schema::{Schema, trainer_growths};
use hypercast_stream::dead_letters::LetterReader;
use hypercast_stream::publish::{BackgroundPublisher, Publisher};
use hypercast_stream::registry::RegistryFollower;
use hypercast_stream::streams::{StreamEngine, StreamPlace, Topic};

/// How long the first record of a batch waits for others.
const BATCH_WAIT: Duration = Duration::from_millis(500);

/// How often it looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What to follow, and how.
#[derive(Debug, Clone)]
pub struct FollowFmOptions {
    /// The version that is trained: it names the stream of weights and the work folder.
    pub version: String,
    /// A saved trainer to begin with, where this version has not begun; else what `train fm` left,
    /// if anything.
    pub from: Option<PathBuf>,
    /// Where to answer `/metrics`.
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of the stream.
    pub until_end: bool,
}

/// Follows until it is asked to stop; then it has saved and published. Lines of JSON go to `out`.
///
/// # Errors
/// A work folder that another process has, a saved state that is damaged or of another
/// configuration, a full disk, an engine that is away for long.
pub fn follow(
    context: ServiceContext<'_>,
    options: &FollowFmOptions,
    shutdown: &Shutdown,
    out: &mut dyn Write,
) -> Result<FollowFmReport> {
    let follower = FmFollower::open(context, options, Arc::new(BurnRuntime), shutdown)?;
    let _metrics = serve_metrics(&follower.telemetry, options.metrics, out)?;
    follower.run(out)
}

/// The work folder of a version's trainer.
pub fn work_dir(config: &Config, version: &str) -> PathBuf {
    config.paths.fm_work.join("follow").join(version)
}

/// What a trainer begins with.
struct TrainerBegin<'a> {
    config: &'a Config,
    spec: &'a FmSpec,
    options: &'a FollowFmOptions,
    work: &'a Path,
    runtime: &'a dyn FmRuntime,
    growths: &'a [SpecGrowth],
}

impl TrainerBegin<'_> {
    /// The trainer where this version stands, or what it begins with and no place.
    fn open(&self) -> Result<(Box<dyn FmTrainer>, Option<FmCheckpoint>)> {
        let TrainerBegin { config, spec, options, work, runtime, growths } = *self;
        let own = work.join("trainer");
        let resume = |saved: &Path| {
            let from = ResumePaths { saved, work: &own, growths };
            runtime.resume(from, &config.fm, spec, config.device)
        };
        if let Some(place) = FmCheckpoint::read(work)? {
            return Ok((resume(&checkpoint::trainer_dir(work))?, Some(place)));
        }
        let trained = super::fm::trained_dir(config);
        let from = options.from.clone().or_else(|| disk::exists(&trained).then_some(trained));
        let trainer = match from {
            Some(from) => resume(&from)?,
            None => {
                tracing::warn!(
                    "no trained FM to begin with; it begins anew (`hypercast train fm` trains one on the past)"
                );
                atomic_dir::remove(&own)?;
                runtime.create(&own, &config.fm, spec, config.device)?
            }
        };
        Ok((trainer, None))
    }
}

/// Follows `joined`, learns from it, and publishes what moved.
pub struct FmFollower {
    config: Config,
    options: FollowFmOptions,
    work: PathBuf,
    engine: Arc<dyn StreamEngine>,
    schema: Arc<Schema>,
    reader: JoinedReader,
    /// Records that were read before the first publication and not learned from yet.
    ahead: VecDeque<PositionedExample>,
    batch: JoinedBatch,
    trainer: Box<dyn FmTrainer>,
    publisher: BackgroundPublisher,
    /// What is being published.
    publication: Option<FmPublication>,
    /// Whether this version was published, or held, before anything was learned from.
    is_begun: bool,
    registry: RegistryFollower,
    gate: FmPublishGate,
    place: FmCheckpoint,
    progress: FmProgress,
    telemetry: Arc<JobMetrics>,
    meters: FmMeters,
    asked_at: Instant,
    /// How far the trainer had learned when it asked the gate last.
    asked_position: Option<u64>,
    saved_requests: u64,
    failures: RepeatedFailures,
    report: FollowFmReport,
    stop: Shutdown,
    _owner: DirLock,
}

/// Records that are learned from together.
#[derive(Default)]
struct JoinedBatch {
    examples: Vec<Example>,
    corrections: Vec<Example>,
    /// When the newest event of each example was taken in.
    ingested_ms: Vec<i64>,
    /// When the newest of all events was.
    newest_ms: i64,
    /// Where the examples, and the corrections, were read.
    keys: [Vec<RecordKey>; 2],
    /// How far the stream was read; none if all records are tried again.
    end: Option<StreamPlace>,
    /// How far orders to try records again were read.
    orders: u64,
    since: Option<Instant>,
}

impl JoinedBatch {
    fn len(&self) -> usize {
        self.examples.len() + self.corrections.len()
    }

    fn add(&mut self, record: PositionedExample) {
        let PositionedExample { example, correction, ingested_ms, key, .. } = record;
        self.since.get_or_insert_with(clock::instant);
        self.keys[usize::from(correction)].push(key);
        self.newest_ms = self.newest_ms.max(ingested_ms);
        if correction {
            self.corrections.push(example);
        } else {
            self.ingested_ms.push(ingested_ms);
            self.examples.push(example);
        }
    }
}

impl FmFollower {
    /// Locks the work folder, and goes on where this version was saved. `runtime` makes the models.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn open(
        context: ServiceContext<'_>,
        options: &FollowFmOptions,
        runtime: Arc<dyn FmRuntime>,
        stop: &Shutdown,
    ) -> Result<FmFollower> {
        let ServiceContext { dataset, config, engine } = context.clone();
        let work = work_dir(config, &options.version);
        let owner = DirLock::acquire(&work)?;
        let spec = dataset_spec(dataset)?;
        let growths = trainer_growths(&dataset.schema)?;
        let begin = TrainerBegin {
            config,
            spec: &spec,
            options,
            work: &work,
            runtime: &*runtime,
            growths: &growths,
        };
        let (trainer, place) = begin.open()?;
        let from = JoinedPosition {
            joined: place.as_ref().map(|place| place.joined.clone()),
            orders: place.as_ref().and_then(|place| place.orders),
        };
        let telemetry = Arc::new(JobMetrics::default());
        let topic = Topic::fm(&options.version);
        let published = work.join("published");
        let publisher =
            Publisher::open(engine.clone(), topic.clone(), config.publish.clone(), &published)?;
        let has_published = publisher.has_snapshot();
        let (version, work_of) = (options.version.as_str(), &*work);
        let trained =
            TrainedVersion { version, spec: &spec, work: work_of, has_published, runtime };
        let mut window = EvalWindow::of_fm(&spec, config.fm_gate.rows);
        checkpoint::read_measured(&work, &mut window);
        let mut gate = FmPublishGate::new(&context, &trained, window, &telemetry)?;
        let reports = RecordReports::of(&telemetry, config, stop);
        let is_known = from.orders.is_some();
        let reader = JoinedReader::open(context, &LetterReader::Trainer(topic), from, reports)?;
        let reader = reader.of_core(&dataset.schema);
        let mut place = place.unwrap_or_else(|| FmCheckpoint::at(reader.place()));
        place.orders = Some(reader.orders_position());
        gate.reread_until_ms = place.reread_until_ms;
        let is_held = config.fm_gate.rows > 0 && HeldPublications::read(&work)?.is_some();
        let mut follower = FmFollower {
            config: config.clone(),
            options: options.clone(),
            work,
            registry: RegistryFollower::new(&*engine)?,
            engine,
            schema: dataset.schema.clone(),
            reader,
            ahead: VecDeque::new(),
            batch: JoinedBatch::default(),
            trainer,
            publisher: BackgroundPublisher::new(publisher),
            publication: None,
            is_begun: has_published,
            gate,
            progress: FmProgress::new(&spec, place.window.clone()),
            meters: FmMeters::new(&telemetry),
            telemetry,
            asked_at: clock::instant(),
            // What is held is asked about again once something was learned since.
            asked_position: is_held.then_some(place.position()),
            saved_requests: place.requests,
            place,
            failures: RepeatedFailures::default(),
            report: FollowFmReport::default(),
            stop: stop.clone(),
            _owner: owner,
        };
        if !is_known {
            // Killed before the next save, it would follow records and orders from another place
            // on.
            follower.save()?;
        }
        Ok(follower)
    }

    fn run(mut self, out: &mut dyn Write) -> Result<FollowFmReport> {
        while !self.stop.is_requested() {
            if !self.step(LOOK_EVERY, out)? {
                break;
            }
        }
        self.finish(out)
    }

    /// Reads what has come, after waiting up to `wait` for the first record, and learns, saves and
    /// publishes as it is due; false at the end of the stream, if it is to stop there. The first
    /// step publishes a version that never was.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn step(&mut self, wait: Duration, out: &mut dyn Write) -> Result<bool> {
        if !self.is_begun {
            self.publish_first(wait, out)?;
            return Ok(true);
        }
        let came = self.read(wait, out)?;
        let at_end = self.options.until_end && !came;
        let waited = self.batch.since.is_some_and(|since| clock::since(since) >= BATCH_WAIT);
        let is_full = self.batch.len() >= self.config.fm.batch_requests.max(1);
        if is_full || waited || (at_end && self.batch.len() > 0) {
            self.learn(out)?;
        } else if at_end {
            return Ok(false);
        }
        let save_every = self.config.fm.save_every_requests;
        if save_every > 0 && self.place.requests - self.saved_requests >= save_every {
            self.save()?;
        }
        if let Err(error) = self.publish_if_due(out) {
            self.publication_failed(&error);
        }
        Ok(true)
    }

    /// Saves where it stands, and publishes what was learned.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn finish(mut self, out: &mut dyn Write) -> Result<FollowFmReport> {
        self.gate.score();
        self.save()?;
        if self.is_begun {
            if let Err(error) = self.await_publication(out) {
                self.publication_failed(&error);
            }
            self.publish(out)?;
            self.await_publication(out)?;
        }
        Ok(self.report())
    }

    /// What it did since it was opened.
    pub fn report(&self) -> FollowFmReport {
        FollowFmReport { position: self.place.position(), ..self.report }
    }

    /// Whether records came, or may be there.
    fn read(&mut self, wait: Duration, out: &mut dyn Write) -> Result<bool> {
        let times = &mut self.report.times;
        for record in timed(&mut times.read, || self.reader.retries())? {
            self.batch.add(record);
        }
        self.batch.orders = self.reader.orders_position();
        // Records that are tried again may have filled it.
        let room = self.config.fm.batch_requests.saturating_sub(self.batch.len()).max(1);
        let read = if self.ahead.is_empty() {
            timed(&mut times.read, || self.reader.next(room, wait))?
        } else {
            JoinedRead::Records(self.ahead.drain(..room.min(self.ahead.len())).collect())
        };
        match read {
            JoinedRead::Records(records) => {
                for record in records {
                    self.batch.end = Some(record.end);
                    self.batch.add(record);
                }
            }
            JoinedRead::Later | JoinedRead::Stopped => {}
            JoinedRead::Gap(gap) => self.pass_gap(gap, out)?,
            JoinedRead::End => return Ok(false),
        }
        Ok(true)
    }

    /// Goes on behind missing records. What was read before is learned from, and where it goes on
    /// is saved before anything else is read.
    fn pass_gap(&mut self, gap: PassedGap, out: &mut dyn Write) -> Result<()> {
        if self.batch.len() > 0 {
            self.learn(out)?;
        }
        let is_asked = self.asked_position == Some(self.place.position());
        if gap.is_back {
            self.place.go_back_to(gap.to);
        } else {
            self.place.joined.move_to(gap.to);
        }
        self.asked_position = is_asked.then_some(self.place.position());
        self.save()?;
        self.gate.reread_until_ms = self.place.reread_until_ms;
        self.reader.go_on();
        Ok(())
    }

    fn learn(&mut self, out: &mut dyn Write) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        let examples: Vec<&Example> = batch.examples.iter().collect();
        let corrections: Vec<&Example> = batch.corrections.iter().collect();
        let step = || self.trainer.step_with_corrections(&examples, &corrections);
        let said = timed(&mut self.report.times.step, step)?;
        // Before the place moves past them.
        self.set_aside(&batch, &said.set_aside)?;
        let now = now_ms();
        batch.ingested_ms.iter().for_each(|ms| self.meters.learning.latency(now - ms));
        self.place.ingested_ms = self.place.ingested_ms.max(batch.newest_ms);
        self.progress.push(&batch.examples, &said);
        let times = batch.examples.iter().map(|example| example.time_ms);
        self.place.until_ms = times.fold(self.place.until_ms, i64::max);
        match batch.end {
            Some(end) => self.place.joined.move_to(end),
            // All were tried again, so there is something to publish although the place stays.
            None => self.asked_position = None,
        }
        self.place.orders = Some(batch.orders);
        let harmful = said.set_aside.iter().filter(|&&at| at < examples.len()).count();
        let requests = (examples.len() - harmful) as u64;
        let late = (corrections.len() + harmful - said.set_aside.len()) as u64;
        self.place.requests += requests;
        self.place.corrections += late;
        self.report.requests += requests;
        self.report.corrections += late;
        self.meters.learning.learned(requests, late);
        let positions: Vec<u64> = batch.keys[0].iter().map(|key| key.position).collect();
        self.gate.observe(batch.examples, &positions, &said);
        if let Some(line) = self.progress.line(&self.place, &mut self.meters.learning) {
            tell(out, &line)?;
        }
        Ok(())
    }

    /// Sets the records aside that were not learned from.
    fn set_aside(&self, batch: &JoinedBatch, set_aside: &[usize]) -> Result<()> {
        let examples = batch.examples.iter().chain(&batch.corrections);
        let records: Vec<_> = examples.zip(batch.keys.iter().flatten()).collect();
        let unusable = |&at: &usize| {
            let (example, key) = records[at];
            key.unusable(example, HARMFUL.to_owned())
        };
        self.reader.set_aside(set_aside.iter().map(unusable).collect())
    }

    fn save(&mut self) -> Result<()> {
        self.place.window = self.progress.window.clone();
        // What cannot be compared without reading or loading a publication is in the next save.
        let is_publishing = self.is_publishing();
        let times = &mut self.report.times;
        if !is_publishing {
            timed(&mut times.gate, || self.gate.score());
        }
        let (work, measured) = (&self.work, &self.gate.window);
        timed(&mut times.save, || self.place.write(work, &mut *self.trainer, measured))?;
        self.saved_requests = self.place.requests;
        Ok(())
    }

    /// Publishes a version for the first time, unless the gate holds it. It is judged by the next
    /// requests of the stream, which are learned from afterwards, and by what was measured before a
    /// restart.
    fn publish_first(&mut self, wait: Duration, out: &mut dyn Write) -> Result<()> {
        self.read_ahead(wait, out)?;
        if self.stop.is_requested() {
            // Not before it is judged.
            return Ok(());
        }
        self.is_begun = true;
        let examples = self.ahead.iter().filter(|record| !record.correction);
        let positions: Vec<u64> = examples.clone().map(|record| record.key.position).collect();
        let examples: Vec<Example> = examples.map(|record| record.example.clone()).collect();
        if !examples.is_empty() {
            self.asked_position = None;
        }
        let said = self.trainer.predict(&examples.iter().collect::<Vec<_>>())?;
        let measured = self.gate.window.rows.clone();
        self.gate.look_at(examples, &positions, said);
        self.publish(out)?;
        // Nothing of it serves yet, and nothing was learned that could go on.
        self.await_publication(out)?;
        self.gate.take_back(measured);
        self.gate.catch_up_beside();
        Ok(())
    }

    /// Reads as many records as the gate may judge by, if they are there.
    fn read_ahead(&mut self, wait: Duration, out: &mut dyn Write) -> Result<()> {
        let mut rows = 0;
        while self.ahead.len() < gate::MOST_REQUESTS
            && rows < self.config.fm_gate.rows
            && !self.stop.is_requested()
        {
            match self.reader.next(gate::MOST_REQUESTS - self.ahead.len(), wait)? {
                JoinedRead::Records(records) => {
                    rows += records.iter().map(|own| own.example.targets.len()).sum::<usize>();
                    self.ahead.extend(records);
                }
                JoinedRead::Later | JoinedRead::Stopped => {}
                JoinedRead::Gap(gap) if self.ahead.is_empty() => self.pass_gap(gap, out)?,
                // Those that were read before missing records are learned from first.
                JoinedRead::Gap(_) | JoinedRead::End => break,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
