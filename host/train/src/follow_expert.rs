//! An expert's trainer as a service: it follows the feature logs as files appear, learns online,
//! publishes, and saves where it stands.
//!
//! Rows are predicted before they are learned from. What they say of the parameters, beside those
//! that were published last, is put to the expert's `evaluate`, which publishes, holds or goes back
//! (`gate`). A correction is learned from too, its changed outcomes alone, and is in no metric. A
//! trainer that begins learns from the logs that are there as `train expert` does, in passes, and
//! goes on behind the stream (`begin`). It needs neither the FM's trainer nor a daemon. All is
//! saved when it begins, when the expert was asked, and where records are missing: what was learned
//! since is learned again.

mod begin;
mod feed;
mod gate;
mod progress;
mod state;

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::example::Example;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::feed::FeedPosition;
use self::{
    begin::{Beginning, OwnVersion, StartedTrainer, begin},
    feed::{FeedItem, FeedPlace, FeedRow, LogFeed},
    gate::{GateDecision, PublishGate},
    progress::ExpertProgress,
    state::{FollowerState, LastPublished, StateAddition},
};
use super::{
    joined_reader::{RecordKey, RecordReports},
    progress_log::{serve_metrics, tell, told},
    stream::{ExpertSetup, ExpertStream},
};
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::{Config, ExpertEntry};
use hypercast_core::clock::now_ms;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::logging::RepeatedFailures;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_data::logs::LoggedRequest;
use hypercast_expert as expert;
use hypercast_expert::{Chunk, train::RefusedRequest, wasm::contract::Verdict};
use hypercast_stream::dead_letters::UnusableRecord;
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::registry::{RegistryFollower, SelfRegisteredExpert, self_register_expert};
use hypercast_stream::streams::{StreamEngine, StreamTrail, Topic};

/// How long the first row of a step waits for others.
const BATCH_WAIT: Duration = Duration::from_millis(500);

/// How often it looks for rows, and whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What to follow, and how.
#[derive(Debug, Clone, Default)]
pub struct FollowExpertOptions {
    /// The version that is trained: it names the stream of weights and the work folder; the
    /// plugin's own if missing.
    pub version: Option<String>,
    /// The FM version whose TAEs it learns with; if missing, the one that the logs hold.
    pub fm: Option<String>,
    /// Surfaces to learn from, by name; if none, those of the configuration.
    pub surfaces: Vec<String>,
    /// A checkpoint that gives TAEs on the spot, for the joined examples themselves instead of the
    /// logs.
    pub fm_checkpoint: Option<PathBuf>,
    /// Where to answer `/metrics`.
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of what is there.
    pub until_end: bool,
}

/// Where a trainer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertCheckpoint {
    /// After the last row learned from.
    pub position: FeedPosition,
    /// Requests learned from behind the stream.
    pub requests: u64,
    /// Late outcomes that were learned from since the version began.
    pub corrections: u64,
    /// Time of the newest request, milliseconds since the epoch.
    pub until_ms: i64,
    /// When the newest event was taken in, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// What a trainer did since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FollowExpertReport {
    /// Where it stands; none if there was nothing to begin with.
    pub place: Option<ExpertCheckpoint>,
    /// How often weights were published in this run.
    pub published: u64,
}

/// What an expert is trained from and with.
#[derive(Clone, Copy)]
pub struct ExpertContext<'a> {
    /// The data set: its content vectors, and the past where TAEs are computed on the spot.
    pub dataset: &'a Dataset,
    /// The whole configuration, for paths and training settings.
    pub config: &'a Config,
    /// The entry of `[[experts]]` that is trained.
    pub entry: &'a ExpertEntry,
    /// Where guests run.
    pub guests: &'a expert::Engine,
}

impl<'a> ExpertContext<'a> {
    fn setup(&self) -> ExpertSetup<'a> {
        ExpertSetup::of(self.config, self.entry, self.guests)
    }
}

/// Follows until it is asked to stop; then it has saved, and published what the expert lets it.
/// Lines of JSON go to `out`.
///
/// # Errors
/// A work folder that another process has, a saved state that is damaged or of another network, a
/// plugin that is refused or faults, a full disk.
pub fn follow(
    context: ExpertContext<'_>,
    engine: Arc<dyn StreamEngine>,
    options: &FollowExpertOptions,
    shutdown: &Shutdown,
    out: &mut dyn Write,
) -> Result<FollowExpertReport> {
    let ExpertContext { config, entry, .. } = context;
    let version = match &options.version {
        Some(version) => version.clone(),
        None => plugin_version(context)?,
    };
    let work = work_dir(config, entry, &version);
    let _owner = DirLock::acquire(&work)?;
    let telemetry = Arc::new(JobMetrics::default());
    let topic = Topic::expert(&entry.name, &version);
    let reports = RecordReports::of(&telemetry, config, shutdown);
    let own = OwnVersion { work: &work, topic: &topic, reports };
    let Some(Beginning { trainer: begun, feed, surfaces }) =
        begin(context, &engine, options, own, shutdown)?
    else {
        return Ok(FollowExpertReport { place: None, published: 0 });
    };
    let StartedTrainer { stream, place, orders: saved_orders, joined, last, measured } = begun;
    let progress = ExpertProgress::new(&context.dataset.schema, &stream.blueprint, &telemetry);
    let (blueprint, limits) = (stream.blueprint.clone(), entry.ne_limits.clone());
    let gate = PublishGate::new(blueprint, limits, &work, &telemetry).resume(measured, last)?;
    serve_metrics(&telemetry, options.metrics, out)?;
    let publisher =
        Publisher::open(engine.clone(), topic, config.publish.clone(), &work.join("published"))?;
    let orders = Some(feed.orders_position());
    let following = ExpertFollower {
        context,
        registry: RegistryFollower::new(&*engine)?,
        engine,
        version,
        work,
        feed,
        surfaces,
        stream,
        place,
        joined,
        orders,
        publisher,
        gate,
        progress,
        asked_at: Instant::now(),
        asked_position: None,
        failures: RepeatedFailures::default(),
        published: 0,
    };
    if saved_orders.is_none() {
        // Killed before the next save, it would carry out orders from another place on.
        following.save(false)?;
    }
    following.run(options, shutdown, out)
}

/// The work folder of a version's trainer.
pub fn work_dir(config: &Config, entry: &ExpertEntry, version: &str) -> PathBuf {
    config.paths.experts.join(&entry.name).join("follow").join(version)
}

fn plugin_version(context: ExpertContext<'_>) -> Result<String> {
    let ExpertContext { dataset, config, entry, guests } = context;
    let options = config.load_options(&entry.name);
    let blueprint = expert::Blueprint::load(guests, &entry.plugin, &dataset.schema, &options)?;
    Ok(blueprint.description.version.clone())
}

struct ExpertFollower<'a> {
    context: ExpertContext<'a>,
    engine: Arc<dyn StreamEngine>,
    version: String,
    work: PathBuf,
    feed: LogFeed,
    surfaces: Vec<u16>,
    stream: ExpertStream,
    place: ExpertCheckpoint,
    /// Where it stands in the stream of joined examples, if it follows that.
    joined: StreamTrail,
    /// The position of the next order to try a row again.
    orders: Option<u64>,
    publisher: Publisher,
    gate: PublishGate,
    progress: ExpertProgress,
    asked_at: Instant,
    /// Where it stood when it asked last whether it may publish.
    asked_position: Option<FeedPosition>,
    failures: RepeatedFailures,
    published: u64,
    registry: RegistryFollower,
}

/// Rows that are learned from together.
#[derive(Default)]
struct LoggedBatch {
    examples: Vec<Example>,
    tae: Vec<f32>,
    rows: usize,
    /// Where the examples were read.
    keys: Vec<RecordKey>,
}

impl LoggedBatch {
    fn add(&mut self, row: FeedRow) {
        let FeedRow { logged: LoggedRequest { example, tae, .. }, key } = row;
        self.rows += example.targets.len();
        self.tae.extend_from_slice(&tae);
        self.examples.push(example);
        self.keys.push(key);
    }

    fn append(&mut self, mut other: LoggedBatch) {
        self.rows += other.rows;
        self.tae.append(&mut other.tae);
        self.examples.append(&mut other.examples);
        self.keys.append(&mut other.keys);
    }

    /// The requests that a trainer refused, as records to set aside.
    fn unusable(&self, refused: &[RefusedRequest]) -> Vec<UnusableRecord> {
        let record = |own: &RefusedRequest| {
            self.keys[own.index].unusable(&self.examples[own.index], own.reason.clone())
        };
        refused.iter().map(record).collect()
    }

    /// Takes the first examples of the batch that are kept, and their rows of what was predicted of
    /// the first examples.
    fn retain(&mut self, first: usize, is_kept: impl Fn(usize) -> bool, said: &mut [Vec<f32>]) {
        let width = self.tae.len() / self.rows.max(1);
        let all = std::mem::take(self);
        let mut kept_rows = Vec::new();
        let mut tae = all.tae.chunks(width.max(1));
        let examples = all.examples.into_iter().zip(all.keys).take(first);
        for (at, (example, key)) in examples.enumerate() {
            let rows = example.targets.len();
            let own: Vec<f32> = tae.by_ref().take(rows).flatten().copied().collect();
            kept_rows.extend(std::iter::repeat_n(is_kept(at), rows));
            if is_kept(at) {
                self.rows += rows;
                self.tae.extend(own);
                self.examples.push(example);
                self.keys.push(key);
            }
        }
        for task in said {
            let mut kept = kept_rows.iter();
            task.retain(|_| *kept.next().expect("a prediction a row"));
        }
    }

    fn chunk(&self) -> Chunk<'_> {
        Chunk { examples: &self.examples, tae: &self.tae }
    }
}

/// Rows and corrections that wait to be learned from.
struct PendingRows {
    rows: LoggedBatch,
    corrections: LoggedBatch,
    ingested_ms: Vec<i64>,
    since: Instant,
    /// After the last of them.
    end: FeedPlace,
    /// After the last order that is carried out with them.
    orders: Option<u64>,
}

impl ExpertFollower<'_> {
    fn run(
        mut self,
        options: &FollowExpertOptions,
        shutdown: &Shutdown,
        out: &mut dyn Write,
    ) -> Result<FollowExpertReport> {
        let most = self.context.config.expert_training.online_batch_rows;
        let every = Duration::from_secs(self.context.config.publish.every_s);
        if !self.publisher.has_snapshot() {
            self.ask(out)?;
        }
        let mut waiting = None::<PendingRows>;
        while !shutdown.is_requested() {
            self.take_retries(&mut waiting)?;
            let next = self.feed.next(LOOK_EVERY)?;
            if matches!(next, FeedItem::Gap) {
                self.pass_gap(waiting.take(), out)?;
                continue;
            }
            let at_end = options.until_end && matches!(next, FeedItem::End);
            if let FeedItem::WindowRow(row) = next
                && self.is_own(&row)
            {
                let end = self.feed.place();
                // A step that a trainer would have to cut would leave it one of a few rows.
                let rows = row.logged.example.targets.len();
                if waiting.as_ref().is_some_and(|own| own.rows() + rows > most) {
                    self.learn(waiting.take().expect("it is there"), out)?;
                }
                let own = waiting.get_or_insert_with(|| PendingRows::new(end));
                own.end = end;
                own.add(row);
            } else if waiting.is_none() {
                self.move_to(self.feed.place());
            }
            let full = |own: &PendingRows| own.rows() >= most;
            let waited = |own: &PendingRows| own.rows.rows > 0 && own.since.elapsed() >= BATCH_WAIT;
            let ready = |own: &PendingRows| full(own) || at_end || waited(own);
            if waiting.as_ref().is_some_and(ready) {
                self.learn(waiting.take().expect("it is there"), out)?;
            }
            if at_end {
                break;
            }
            if self.asked_at.elapsed() >= every
                && let Err(error) = self.ask(out)
                && self.failures.is_news(&error)
            {
                tracing::warn!(%error, "parameters could not be published; trying again later");
            }
        }
        self.ask(out)?;
        Ok(FollowExpertReport { place: Some(self.place), published: self.published })
    }

    /// Adds the rows that an operator had tried again, all to one step: it is saved whole or not at
    /// all.
    fn take_retries(&mut self, waiting: &mut Option<PendingRows>) -> Result<()> {
        let rows = self.feed.retries()?;
        for row in rows.into_iter().filter(|row| self.is_own(row)) {
            let end = match self.place.position {
                FeedPosition::Logs(position) => FeedPlace::Logs(position),
                FeedPosition::Joined(_) => FeedPlace::Joined(self.joined.place()),
            };
            let own = waiting.get_or_insert_with(|| PendingRows::new(end));
            own.orders = Some(self.feed.orders_position());
            own.add(row);
        }
        Ok(())
    }

    /// Goes on behind missing records. What was read before is learned from, and where it goes on
    /// is saved before anything else is read.
    fn pass_gap(&mut self, before: Option<PendingRows>, out: &mut dyn Write) -> Result<()> {
        before.map_or(Ok(()), |rows| self.learn(rows, out))?;
        self.feed.go_on();
        self.move_to(self.feed.place());
        self.save(false)
    }

    fn move_to(&mut self, place: FeedPlace) {
        self.place.position = place.position();
        if let FeedPlace::Joined(place) = place {
            self.joined.move_to(place);
        }
    }

    fn is_own(&self, row: &FeedRow) -> bool {
        let example = &row.logged.example;
        !example.targets.is_empty() && self.surfaces.contains(&example.surface)
    }

    fn learn(&mut self, waiting: PendingRows, out: &mut dyn Write) -> Result<()> {
        let PendingRows { mut rows, corrections, ingested_ms, end, orders, .. } = waiting;
        let mut predictions = match rows.rows {
            0 => Vec::new(),
            _ => self.stream.trainer.predict(rows.chunk())?,
        };
        let times = rows.examples.iter().map(|example| example.time_ms);
        let until_ms = times.fold(self.place.until_ms, i64::max);
        let first = rows.examples.len();
        // One step for both: what is corrected is nearly all of one label, and would take a step of
        // its own as far as all rows together take theirs.
        rows.append(corrections);
        let refused = self.stream.trainer.train(rows.chunk(), |_| ())?;
        self.gate.scheduled(&self.stream.trainer);
        // Before the place moves past them.
        self.feed.set_aside(rows.unusable(&refused))?;
        let is_kept = |at: usize| refused.binary_search_by_key(&at, |own| own.index).is_err();
        let late = (first..rows.examples.len()).filter(|&at| is_kept(at)).count() as u64;
        if orders.is_some() {
            self.orders = orders;
            // What was tried again is new, although the place is not.
            self.asked_position = None;
        }
        rows.retain(first, is_kept, &mut predictions);
        if rows.rows > 0 {
            self.progress.push(&rows.examples, &predictions);
            self.gate.measure(&self.stream.trainer, rows.chunk(), &predictions)?;
        }
        let now_ms = now_ms();
        for ingested_ms in ingested_ms {
            self.place.ingested_ms = self.place.ingested_ms.max(ingested_ms);
            self.progress.learning.latency(now_ms - ingested_ms);
        }
        self.progress.learning.learned(0, late);
        self.move_to(end);
        self.place = ExpertCheckpoint {
            requests: self.place.requests + rows.examples.len() as u64,
            corrections: self.place.corrections + late,
            until_ms,
            ..self.place
        };
        self.progress.line(&self.place).map_or(Ok(()), |line| tell(out, &line))
    }

    /// Asks the expert whether what was learned may be published, and does what it says. Then all
    /// is saved.
    ///
    /// The guest is called in this loop and not on a thread of its own, as a rollout calls it: a
    /// process trains one version, so nobody waits but a request to stop, and that for the deadline
    /// of a call at most (`plugin_limits.setup_deadline_ms`).
    fn ask(&mut self, out: &mut dyn Write) -> Result<()> {
        let position = self.place.position;
        self.asked_at = Instant::now();
        if self.asked_position == Some(position) {
            return Ok(());
        }
        let word = self.gate.ask()?;
        match word.verdict {
            Verdict::Publish => {
                // What is saved is never behind what is published.
                self.save(true)?;
                self.publish(&word, out)?;
            }
            Verdict::Hold(_) => self.save(false)?,
            Verdict::RollBack(_) => {
                if let Some(last) = &self.gate.last {
                    self.stream.trainer.go_back(&last.saved)?;
                }
                // What was measured is of parameters that are no more.
                self.gate.measured.rows.clear();
                self.save(true)?;
            }
        }
        self.asked_position = Some(position);
        word.line(json!(position)).map_or(Ok(()), |line| tell(out, &line))
    }

    /// Saves where it stands, as what is published or as what is held.
    fn save(&self, is_published: bool) -> Result<()> {
        let (published, measured) = match is_published {
            true => (LastPublished::This, Vec::new()),
            false => self.gate.state(),
        };
        let trainer = self.stream.trainer.saved();
        let mean_loss = self.stream.trainer.mean_loss();
        let joined = self.joined.clone();
        let addition = StateAddition { orders: self.orders, mean_loss, joined };
        FollowerState { place: self.place, trainer, published, measured, addition }
            .write(&self.work)
    }

    fn publish(&mut self, word: &GateDecision, out: &mut dyn Write) -> Result<()> {
        let started = Instant::now();
        let facts = TrainingPosition {
            trained_position: self.place.position.number(),
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        let published = self.publisher.publish(self.stream.trainer.parameters(), facts)?;
        self.published += 1;
        self.gate.published(self.stream.trainer.saved())?;
        self.register()?;
        let mut line = told(&published, json!(self.place.position), started.elapsed());
        line["evaluation"] = word.measured.clone();
        tell(out, &line)
    }

    fn register(&mut self) -> Result<()> {
        let ExpertContext { dataset, config, entry, guests } = self.context;
        let own = SelfRegisteredExpert {
            config,
            entry,
            surfaces: &config.serving_surfaces(entry, &dataset.schema)?,
            version: &self.version,
            provenance: &self.stream.trainer.parameters().provenance,
            guests,
            schema: &dataset.schema,
        };
        self_register_expert(&mut self.registry, &*self.engine, &own);
        Ok(())
    }
}

impl PendingRows {
    fn new(end: FeedPlace) -> PendingRows {
        let (rows, corrections) = (LoggedBatch::default(), LoggedBatch::default());
        let (ingested_ms, since) = (Vec::new(), Instant::now());
        PendingRows { rows, corrections, ingested_ms, since, end, orders: None }
    }

    fn rows(&self) -> usize {
        self.rows.rows + self.corrections.rows
    }

    fn add(&mut self, row: FeedRow) {
        if row.logged.correction {
            return self.corrections.add(row);
        }
        self.ingested_ms.extend(Some(row.logged.ingested_ms).filter(|&ms| ms > 0));
        self.rows.add(row);
    }
}

#[cfg(test)]
mod tests;
