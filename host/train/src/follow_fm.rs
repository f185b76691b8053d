//! The FM's trainer as a service: it learns from the stream of joined examples as it grows,
//! publishes what moved, and saves where it stands.
//!
//! Requests are predicted before they are learned from, in batches as they are there: a full one,
//! or what has come after a short wait. A correction is learned from in the same steps, its changed
//! outcomes alone, and is in no metric. What is saved goes on bit for bit; which records make a
//! batch depends on when they come, so two runs are equal where the records were there. All is
//! saved before the first record, and again where records are missing, so that a trainer that is
//! killed knows where it stood. A publication that is worse than what serves is held (`gate`), and
//! learning goes on. It neither joins nor logs, and needs no daemon.

mod checkpoint;
mod gate;
mod progress;

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
    harm::HARMFUL,
    spec::FmSpec,
    trainer::{self, FmTrainer, ResumePaths},
};
use serde_json::json;

use self::{
    checkpoint::FmCheckpoint,
    gate::{FmPublishGate, TrainedVersion},
    progress::{FmMeters, FmProgress},
};
use super::{
    eval_window::EvalWindow,
    fm::dataset_spec,
    holds::HeldPublications,
    joined_reader::{
        JoinedPosition, JoinedRead, JoinedReader, PassedGap, PositionedExample, RecordKey,
        RecordReports,
    },
    progress_log::{serve_metrics, tell, told},
};
use crate::ServiceContext;
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_core::clock::now_ms;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::logging::RepeatedFailures;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_stream::dead_letters::LetterReader;
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::registry::self_register_fm;
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

/// What a trainer did since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FollowFmReport {
    /// Requests learned from.
    pub requests: u64,
    /// Corrections learned from.
    pub corrections: u64,
    /// Publications.
    pub published: u64,
    /// Publications that were held.
    pub held: u64,
    /// Where it stands in the stream.
    pub position: u64,
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
    let ServiceContext { dataset, config, engine } = context.clone();
    let work = work_dir(config, &options.version);
    let _owner = DirLock::acquire(&work)?;
    let spec = dataset_spec(dataset)?;
    let (trainer, place) = begin(config, &spec, options, &work)?;
    let from = JoinedPosition {
        joined: place.as_ref().map(|place| place.joined.clone()),
        orders: place.as_ref().and_then(|place| place.orders),
    };
    let telemetry = Arc::new(JobMetrics::default());
    let meters = FmMeters::new(&telemetry);
    serve_metrics(&telemetry, options.metrics, out)?;
    let topic = Topic::fm(&options.version);
    let published = work.join("published");
    let publisher =
        Publisher::open(engine.clone(), topic.clone(), config.publish.clone(), &published)?;
    let has_published = publisher.has_snapshot();
    let trained =
        TrainedVersion { version: &options.version, spec: &spec, work: &work, has_published };
    let mut window = EvalWindow::of_fm(&spec, config.fm_gate.rows);
    checkpoint::read_measured(&work, &mut window);
    let mut gate = FmPublishGate::new(&context, &trained, window, &telemetry)?;
    let reports = RecordReports::of(&telemetry, config, shutdown);
    let is_known = from.orders.is_some();
    let reader = JoinedReader::open(context, &LetterReader::Trainer(topic), from, reports)?;
    let mut place = place.unwrap_or_else(|| FmCheckpoint::at(reader.place()));
    place.orders = Some(reader.orders_position());
    gate.reread_until_ms = place.reread_until_ms;
    let is_held = config.fm_gate.rows > 0 && HeldPublications::read(&work)?.is_some();
    let mut follower = FmFollower {
        config,
        options,
        work,
        engine,
        dataset,
        reader,
        ahead: VecDeque::new(),
        trainer,
        publisher,
        gate,
        progress: FmProgress::new(&spec, place.window.clone()),
        asked_at: Instant::now(),
        // What is held is asked about again once something was learned since.
        asked_position: is_held.then_some(place.position()),
        saved_requests: place.requests,
        place,
        meters,
        failures: RepeatedFailures::default(),
        report: FollowFmReport::default(),
    };
    if !is_known {
        // Killed before the next save, it would follow records and orders from another place on.
        follower.save()?;
    }
    follower.run(shutdown, out)
}

/// The work folder of a version's trainer.
pub fn work_dir(config: &Config, version: &str) -> PathBuf {
    config.paths.fm_work.join("follow").join(version)
}

/// The trainer where this version stands, or what it begins with and no place.
fn begin(
    config: &Config,
    spec: &FmSpec,
    options: &FollowFmOptions,
    work: &Path,
) -> Result<(Box<dyn FmTrainer>, Option<FmCheckpoint>)> {
    let own = work.join("trainer");
    let resume = |saved: &Path| {
        let from = ResumePaths { saved, work: &own };
        trainer::resume(from, &config.fm, spec, config.device)
    };
    if let Some(place) = FmCheckpoint::read(work)? {
        return Ok((resume(&checkpoint::trainer_dir(work))?, Some(place)));
    }
    let trained = super::fm::trained_dir(config);
    let from = options.from.clone().or_else(|| trained.exists().then_some(trained));
    let trainer = match from {
        Some(from) => resume(&from)?,
        None => {
            tracing::warn!(
                "no trained FM to begin with; it begins anew (`hypercast train fm` trains one on the past)"
            );
            atomic_dir::remove(&own)?;
            trainer::create(&own, &config.fm, spec, config.device)?
        }
    };
    Ok((trainer, None))
}

struct FmFollower<'a> {
    config: &'a Config,
    options: &'a FollowFmOptions,
    work: PathBuf,
    engine: Arc<dyn StreamEngine>,
    dataset: &'a Dataset,
    reader: JoinedReader,
    /// Records that were read before the first publication and not learned from yet.
    ahead: VecDeque<PositionedExample>,
    trainer: Box<dyn FmTrainer>,
    publisher: Publisher,
    gate: FmPublishGate,
    place: FmCheckpoint,
    progress: FmProgress,
    meters: FmMeters,
    asked_at: Instant,
    /// How far the trainer had learned when it asked the gate last.
    asked_position: Option<u64>,
    saved_requests: u64,
    failures: RepeatedFailures,
    report: FollowFmReport,
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
        self.since.get_or_insert_with(Instant::now);
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

impl FmFollower<'_> {
    fn run(mut self, stop: &Shutdown, out: &mut dyn Write) -> Result<FollowFmReport> {
        let size = self.config.fm.batch_requests.max(1);
        let every = Duration::from_secs(self.config.publish.every_s);
        let mut batch = JoinedBatch::default();
        if !self.publisher.has_snapshot() {
            self.publish_first(stop, out)?;
        }
        while !stop.is_requested() {
            let came = self.read(&mut batch, out)?;
            let at_end = self.options.until_end && !came;
            let waited = batch.since.is_some_and(|since| since.elapsed() >= BATCH_WAIT);
            if batch.len() >= size || waited || (at_end && batch.len() > 0) {
                self.learn(std::mem::take(&mut batch), out)?;
            } else if at_end {
                break;
            }
            let save_every = self.config.fm.save_every_requests;
            if save_every > 0 && self.place.requests - self.saved_requests >= save_every {
                self.save()?;
            }
            if self.asked_at.elapsed() >= every
                && let Err(error) = self.publish(out)
            {
                self.meters.failures.inc();
                if self.failures.is_news(&error) {
                    tracing::warn!(%error, "weights could not be published; trying again later");
                }
                self.asked_at = Instant::now();
            }
        }
        self.save()?;
        self.publish(out)?;
        self.report.position = self.place.position();
        Ok(self.report)
    }

    /// Whether records came, or may be there.
    fn read(&mut self, batch: &mut JoinedBatch, out: &mut dyn Write) -> Result<bool> {
        self.reader.retries()?.into_iter().for_each(|record| batch.add(record));
        batch.orders = self.reader.orders_position();
        // Records that are tried again may have filled it.
        let room = self.config.fm.batch_requests.saturating_sub(batch.len()).max(1);
        let read = if self.ahead.is_empty() {
            self.reader.next(room, LOOK_EVERY)?
        } else {
            JoinedRead::Records(self.ahead.drain(..room.min(self.ahead.len())).collect())
        };
        match read {
            JoinedRead::Records(records) => {
                for record in records {
                    batch.end = Some(record.end);
                    batch.add(record);
                }
            }
            JoinedRead::Later => {}
            JoinedRead::Gap(gap) => self.pass_gap(gap, std::mem::take(batch), out)?,
            JoinedRead::End => return Ok(false),
        }
        Ok(true)
    }

    /// Goes on behind missing records. What was read before is learned from, and where it goes on
    /// is saved before anything else is read.
    fn pass_gap(&mut self, gap: PassedGap, before: JoinedBatch, out: &mut dyn Write) -> Result<()> {
        if before.len() > 0 {
            self.learn(before, out)?;
        }
        let is_asked = self.asked_position == Some(self.place.position());
        self.place.joined.move_to(gap.to);
        self.asked_position = is_asked.then_some(self.place.position());
        if gap.is_back {
            self.place.reread_until_ms = Some(self.place.until_ms);
        }
        self.save()?;
        self.gate.reread_until_ms = self.place.reread_until_ms;
        self.reader.go_on();
        Ok(())
    }

    fn learn(&mut self, batch: JoinedBatch, out: &mut dyn Write) -> Result<()> {
        let examples: Vec<&Example> = batch.examples.iter().collect();
        let corrections: Vec<&Example> = batch.corrections.iter().collect();
        let said = self.trainer.step_with_corrections(&examples, &corrections)?;
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
        self.gate.score();
        self.place.write(&self.work, &mut *self.trainer, &self.gate.window)?;
        self.saved_requests = self.place.requests;
        Ok(())
    }

    /// Publishes a version for the first time, unless the gate holds it. It is judged by the next
    /// requests of the stream, which are learned from afterwards, and by what was measured before a
    /// restart.
    fn publish_first(&mut self, stop: &Shutdown, out: &mut dyn Write) -> Result<()> {
        self.read_ahead(stop, out)?;
        if stop.is_requested() {
            // Not before it is judged.
            self.asked_position = Some(self.place.position());
            return Ok(());
        }
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
        self.gate.take_back(measured);
        Ok(())
    }

    /// Reads as many records as the gate may judge by, if they are there.
    fn read_ahead(&mut self, stop: &Shutdown, out: &mut dyn Write) -> Result<()> {
        let mut rows = 0;
        while self.ahead.len() < gate::MOST_REQUESTS
            && rows < self.config.fm_gate.rows
            && !stop.is_requested()
        {
            match self.reader.next(gate::MOST_REQUESTS - self.ahead.len(), LOOK_EVERY)? {
                JoinedRead::Records(records) => {
                    rows += records.iter().map(|own| own.example.targets.len()).sum::<usize>();
                    self.ahead.extend(records);
                }
                JoinedRead::Later => {}
                JoinedRead::Gap(gap) if self.ahead.is_empty() => {
                    self.pass_gap(gap, JoinedBatch::default(), out)?;
                }
                // Those that were read before missing records are learned from first.
                JoinedRead::Gap(_) | JoinedRead::End => break,
            }
        }
        Ok(())
    }

    /// Publishes what was learned, unless the gate holds it.
    fn publish(&mut self, out: &mut dyn Write) -> Result<()> {
        let started = Instant::now();
        self.asked_at = started;
        if self.asked_position == Some(self.place.position()) {
            return Ok(());
        }
        let facts = TrainingPosition {
            trained_position: self.place.position(),
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        self.gate.score();
        self.gate.compare_taes(&*self.trainer)?;
        let trained = self.trainer.trained_weights(&self.options.version)?;
        let verdict = self.gate.judge(&trained.manifest);
        let mut line = match &verdict.held {
            Some(reason) => {
                self.gate.held(reason)?;
                self.report.held += 1;
                json!({ "kind": "held", "reason": reason, "position": self.place.position() })
            }
            None => {
                let published = self.publisher.publish(&trained, facts)?;
                self_register_fm(&*self.engine, &trained.manifest, &self.dataset.schema);
                self.gate.published()?;
                self.report.published += 1;
                self.meters.published(started.elapsed(), &published);
                told(&published, json!(self.place.position()), started.elapsed())
            }
        };
        self.asked_position = Some(self.place.position());
        verdict.describe(&mut line);
        tell(out, &line)
    }
}

#[cfg(test)]
mod tests;
