//! The FM's trainer as a service: it learns from the stream of joined examples as it grows,
//! publishes what moved, and saves where it stands.
//!
//! Requests are predicted before they are learned from, in batches as they are there: a full one,
//! or what has come after a short wait. A correction is learned from in the same steps, its changed
//! outcomes alone, and is in no metric. What is saved goes on bit for bit; which records make a
//! batch depends on when they come, so two runs are equal where the records were there. It neither
//! joins nor logs, and needs no daemon.

mod checkpoint;
mod progress;

use std::{
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::{
    example::Example,
    spec::FmSpec,
    trainer::{self, FmTrainer, ResumePaths},
};
use serde_json::json;

use self::{
    checkpoint::FmCheckpoint,
    progress::{FmMeters, FmProgress},
};
use super::{
    fm::dataset_spec,
    joined_reader::JoinedReader,
    progress_log::{serve_metrics, tell, told},
};
use crate::ServiceContext;
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::Config;
use hypercast_core::clock::now_ms;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
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
    let ServiceContext { dataset, config, engine } = context;
    let work = work_dir(config, &options.version);
    let _owner = DirLock::acquire(&work)?;
    let spec = dataset_spec(dataset)?;
    let (trainer, place) = begin(config, &spec, options, &work)?;
    let from = place.as_ref().map(FmCheckpoint::stream_place);
    let place = place.unwrap_or_default();
    let telemetry = Arc::new(JobMetrics::default());
    let meters = FmMeters::new(&telemetry);
    serve_metrics(&telemetry, options.metrics, out)?;
    let topic = Topic::fm(&options.version);
    let publisher =
        Publisher::open(engine.clone(), topic, config.publish.clone(), &work.join("published"))?;
    let gaps = telemetry.gaps(config.engine.on_gap);
    let reader = JoinedReader::open(engine.clone(), dataset, from, gaps)?;
    let follower = FmFollower {
        config,
        options,
        work,
        engine,
        dataset,
        reader,
        trainer,
        publisher,
        progress: FmProgress::new(&spec, place.window.clone()),
        published_at: Instant::now(),
        published_position: None,
        saved_requests: place.requests,
        place,
        meters,
        report: FollowFmReport::default(),
    };
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
            super::fm::remove_dir(&own)?;
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
    trainer: Box<dyn FmTrainer>,
    publisher: Publisher,
    place: FmCheckpoint,
    progress: FmProgress,
    meters: FmMeters,
    published_at: Instant,
    /// How far the trainer had learned when it published last.
    published_position: Option<u64>,
    saved_requests: u64,
    report: FollowFmReport,
}

/// Records that are learned from together.
#[derive(Default)]
struct JoinedBatch {
    examples: Vec<Example>,
    corrections: Vec<Example>,
    /// When the newest event of each example was taken in.
    ingested_ms: Vec<i64>,
    /// Positions of the examples, and of the corrections, in the stream.
    positions: [Vec<u64>; 2],
    end: StreamPlace,
    since: Option<Instant>,
}

impl JoinedBatch {
    fn len(&self) -> usize {
        self.examples.len() + self.corrections.len()
    }
}

impl FmFollower<'_> {
    fn run(mut self, stop: &Shutdown, out: &mut dyn Write) -> Result<FollowFmReport> {
        let size = self.config.fm.batch_requests.max(1);
        let every = Duration::from_secs(self.config.publish.every_s);
        let mut batch = JoinedBatch::default();
        if !self.publisher.has_snapshot() {
            self.publish(out)?;
        }
        while !stop.is_requested() {
            let came = self.read(&mut batch, size)?;
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
            if self.published_at.elapsed() >= every
                && let Err(error) = self.publish(out)
            {
                self.meters.failures.inc();
                tracing::warn!(%error, "weights could not be published; trying again later");
                self.published_at = Instant::now();
            }
        }
        self.save()?;
        self.publish(out)?;
        self.report.position = self.place.position;
        Ok(self.report)
    }

    /// Whether records came, or may be there.
    fn read(&mut self, batch: &mut JoinedBatch, size: usize) -> Result<bool> {
        let Some(records) = self.reader.next(size - batch.len(), LOOK_EVERY)? else {
            return Ok(true);
        };
        let came = !records.is_empty();
        for record in records {
            batch.end = record.end;
            batch.since.get_or_insert_with(Instant::now);
            batch.positions[usize::from(record.correction)].push(record.end.position - 1);
            if record.correction {
                self.place.ingested_ms = self.place.ingested_ms.max(record.ingested_ms);
                batch.corrections.push(record.example);
            } else {
                batch.ingested_ms.push(record.ingested_ms);
                batch.examples.push(record.example);
            }
        }
        Ok(came)
    }

    fn learn(&mut self, batch: JoinedBatch, out: &mut dyn Write) -> Result<()> {
        let examples: Vec<&Example> = batch.examples.iter().collect();
        let corrections: Vec<&Example> = batch.corrections.iter().collect();
        let said = self.trainer.step_with_corrections(&examples, &corrections)?;
        self.report_set_aside(&batch, &said.set_aside);
        let now = now_ms();
        for &ingested_ms in &batch.ingested_ms {
            self.meters.learning.latency(now - ingested_ms);
            self.place.ingested_ms = self.place.ingested_ms.max(ingested_ms);
        }
        self.progress.push(&batch.examples, &said);
        let times = batch.examples.iter().map(|example| example.time_ms);
        self.place.until_ms = times.fold(self.place.until_ms, i64::max);
        (self.place.position, self.place.checksum) = (batch.end.position, batch.end.checksum);
        let (requests, late) = (batch.examples.len() as u64, batch.corrections.len() as u64);
        self.place.requests += requests;
        self.place.corrections += late;
        self.report.requests += requests;
        self.report.corrections += late;
        self.meters.learning.learned(requests, late);
        if let Some(line) = self.progress.line(&self.place, &mut self.meters.learning) {
            tell(out, &line)?;
        }
        Ok(())
    }

    /// Counts the records that were not learned from, and logs where they are.
    fn report_set_aside(&self, batch: &JoinedBatch, set_aside: &[usize]) {
        let records = batch.examples.iter().chain(&batch.corrections);
        let records = records.zip(batch.positions.iter().flatten()).enumerate();
        for (_, (example, position)) in records.filter(|(at, _)| set_aside.contains(at)) {
            let (request, user) = (example.request, example.user.id);
            tracing::warn!(position, request, user, "a record would harm the model; set aside");
            self.meters.set_aside.inc();
        }
    }

    fn save(&mut self) -> Result<()> {
        self.place.window = self.progress.window.clone();
        self.place.write(&self.work, &mut *self.trainer)?;
        self.saved_requests = self.place.requests;
        Ok(())
    }

    fn publish(&mut self, out: &mut dyn Write) -> Result<()> {
        let started = Instant::now();
        self.published_at = started;
        if self.published_position == Some(self.place.position) {
            return Ok(());
        }
        let facts = TrainingPosition {
            trained_position: self.place.position,
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        let trained = self.trainer.trained_weights(&self.options.version)?;
        let published = self.publisher.publish(&trained, facts)?;
        self_register_fm(&*self.engine, &trained.manifest, &self.dataset.schema);
        self.published_position = Some(self.place.position);
        self.report.published += 1;
        self.meters.published(started.elapsed(), &published);
        tell(out, &told(&published, json!(self.place.position), started.elapsed()))
    }
}

#[cfg(test)]
mod tests;
