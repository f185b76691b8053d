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

mod batch;
mod begin;
mod feed;
mod gate;
mod online;
mod progress;
mod state;

use std::{
    io::Write,
    net::SocketAddr,
    path::PathBuf,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::json;

use self::{
    batch::PendingRows,
    begin::StartedTrainer,
    feed::{FeedItem, FeedPlace, FeedRow, LogFeed},
    gate::{GateDecision, PublishGate},
    online::PluginRuntime,
    progress::ExpertProgress,
    state::{FollowerState, LastPublished, StateAddition},
};
pub use self::{
    feed::FeedPosition,
    online::{ExpertRuntime, OnlineExpert},
};
use super::{
    checkpoint_embedder::EmbeddingCheckpoint,
    holds::HoldLog,
    progress_log::{serve_metrics, tell, told},
    stream::ExpertSetup,
};
use crate::error::Result;
use crate::job_metrics::JobMetrics;
use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_core::clock::{self, now_ms};
use hypercast_core::dir_lock::DirLock;
use hypercast_core::logging::RepeatedFailures;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::Dataset;
use hypercast_data::logs::LogPosition;
use hypercast_expert as expert;
use hypercast_expert::wasm::contract::Verdict;
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::registry::{Registry, RegistryFollower, self_register_expert};
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
    pub fm_checkpoint: Option<EmbeddingCheckpoint>,
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
    /// The engine in which the plugin's guests run.
    pub guests: &'a expert::Engine,
}

impl<'a> ExpertContext<'a> {
    fn setup(&self) -> ExpertSetup<'a> {
        let own = ExpertSetup::of(self.config, self.entry, self.guests);
        ExpertSetup { content_dim: Some(self.dataset.content), ..own }
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
    let version = match &options.version {
        Some(version) => version.clone(),
        None => plugin_version(context)?,
    };
    let options = FollowExpertOptions { version: Some(version), ..options.clone() };
    let ExpertContext { dataset, config, entry, .. } = context;
    let services = ExpertServices { dataset, engine, runtime: Box::new(PluginRuntime(context)) };
    let follower = ExpertFollower::open(services, config, entry, &options, shutdown)?;
    let _metrics = serve_metrics(&follower.own.telemetry, options.metrics, out)?;
    follower.run(out)
}

/// The work folder of a version's trainer.
pub fn work_dir(config: &Config, entry: &ExpertEntry, version: &str) -> PathBuf {
    config.paths.experts.join(&entry.name).join("follow").join(version)
}

fn plugin_version(context: ExpertContext<'_>) -> Result<String> {
    let ExpertContext { dataset, config, entry, guests } = context;
    let options = config.load_options(&entry.name, dataset.content);
    let blueprint = expert::Blueprint::load(guests, &entry.plugin, &dataset.schema, &options)?;
    Ok(blueprint.description.version.clone())
}

/// What a trainer of experts works with.
pub struct ExpertServices<'a> {
    /// The data set, for its schema and the past.
    pub dataset: &'a Dataset,
    /// The streams of weights, decisions and dead letters, and of joined examples.
    pub engine: Arc<dyn StreamEngine>,
    /// What makes experts and goes on with saved ones.
    pub runtime: Box<dyn ExpertRuntime + 'a>,
}

/// What is trained, from what, and by what.
struct FollowedVersion<'a> {
    dataset: &'a Dataset,
    config: Config,
    entry: ExpertEntry,
    engine: Arc<dyn StreamEngine>,
    options: FollowExpertOptions,
    version: String,
    work: PathBuf,
    /// The stream of its weights, by which it sets records aside.
    topic: Topic,
    /// The surfaces whose rows it learns from.
    surfaces: Vec<u16>,
    runtime: Box<dyn ExpertRuntime + 'a>,
    telemetry: Arc<JobMetrics>,
    stop: Shutdown,
}

/// Follows the feature logs, or the joined examples, and trains one version of an expert.
pub struct ExpertFollower<'a> {
    own: Rc<FollowedVersion<'a>>,
    /// None until there is something to learn from.
    training: Option<OnlineTraining<'a>>,
    /// Where the logs ended that were looked through and had nothing.
    looked_to: Option<LogPosition>,
    /// Whether it was said that it waits for that.
    waits: bool,
    _owner: DirLock,
}

/// A version that has begun.
struct OnlineTraining<'a> {
    own: Rc<FollowedVersion<'a>>,
    feed: LogFeed,
    expert: Box<dyn OnlineExpert>,
    waiting: Option<PendingRows>,
    place: ExpertCheckpoint,
    /// Where it stands in the stream of joined examples, if it follows that.
    joined: StreamTrail,
    /// The position of the next order to try a row again.
    orders: Option<u64>,
    publisher: Publisher,
    gate: PublishGate,
    progress: ExpertProgress,
    /// When it asked last whether it may publish; none if this is due.
    asked_at: Option<Instant>,
    /// Where it stood then.
    asked_position: Option<FeedPosition>,
    failures: RepeatedFailures,
    published: u64,
    registry: RegistryFollower,
}

impl<'a> ExpertFollower<'a> {
    /// Locks the work folder of the version, which `options` must name, and goes on where it was
    /// saved.
    ///
    /// # Errors
    /// As [`follow`].
    ///
    /// # Panics
    /// The options name no version.
    pub fn open(
        services: ExpertServices<'a>,
        config: &Config,
        entry: &ExpertEntry,
        options: &FollowExpertOptions,
        stop: &Shutdown,
    ) -> Result<ExpertFollower<'a>> {
        let ExpertServices { dataset, engine, runtime } = services;
        let version = options.version.clone().expect("a version to train");
        let work = work_dir(config, entry, &version);
        let owner = DirLock::acquire(&work)?;
        let mut of = entry.clone();
        if !options.surfaces.is_empty() {
            (of.surfaces, of.train_on) = (options.surfaces.clone(), TrainOn::Own);
        }
        let own = FollowedVersion {
            dataset,
            config: config.clone(),
            entry: entry.clone(),
            engine,
            topic: Topic::expert(&entry.name, &version),
            options: options.clone(),
            version,
            work,
            surfaces: config.training_surfaces(&of, &dataset.schema)?,
            runtime,
            telemetry: Arc::default(),
            stop: stop.clone(),
        };
        let own = Rc::new(own);
        let mut looked_to = None;
        let training = OnlineTraining::begin(&own, &mut looked_to)?;
        Ok(ExpertFollower { own, training, looked_to, waits: false, _owner: owner })
    }

    fn run(mut self, out: &mut dyn Write) -> Result<FollowExpertReport> {
        while !self.own.stop.is_requested() && self.step(LOOK_EVERY, out)? {}
        self.finish(out)
    }

    /// Reads what has come, after waiting up to `wait` for it, and learns, saves and publishes as
    /// it is due; false at the end of what is there, if it is to stop there. The first step
    /// publishes a version that never was.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn step(&mut self, wait: Duration, out: &mut dyn Write) -> Result<bool> {
        if self.training.is_none() {
            self.training = OnlineTraining::begin(&self.own, &mut self.looked_to)?;
        }
        if let Some(training) = &mut self.training {
            return training.step(wait, out);
        }
        if self.own.options.until_end {
            return Ok(false);
        }
        if !std::mem::replace(&mut self.waits, true) {
            let (logs, name) = (self.own.config.paths.logs.display(), &self.own.entry.name);
            tracing::warn!(
                "{logs}: no rows of expert {name} yet, or none since the schema has grown; it waits \
                 for them (`hypercast materialise --follow` writes them)"
            );
        }
        clock::sleep(wait);
        Ok(true)
    }

    /// Saves where it stands, and publishes what the expert lets it.
    ///
    /// # Errors
    /// As [`follow`].
    pub fn finish(mut self, out: &mut dyn Write) -> Result<FollowExpertReport> {
        self.training.as_mut().map_or(Ok(()), |training| training.ask(out))?;
        Ok(self.report())
    }

    /// What it did since it was opened.
    pub fn report(&self) -> FollowExpertReport {
        let training = self.training.as_ref();
        FollowExpertReport {
            place: training.map(|training| training.place),
            published: training.map_or(0, |training| training.published),
        }
    }
}

impl<'a> OnlineTraining<'a> {
    /// Goes on where the version was saved, or begins with the past; none if there is none yet.
    fn begin(
        own: &Rc<FollowedVersion<'a>>,
        looked_to: &mut Option<LogPosition>,
    ) -> Result<Option<OnlineTraining<'a>>> {
        let Some(begun) = begin::begin(own, looked_to)? else { return Ok(None) };
        let feed = begin::feed(own, &begun)?;
        let StartedTrainer { expert, place, orders: saved_orders, joined, last, measured } = begun;
        let FollowedVersion { config, engine, work, telemetry, .. } = &**own;
        let limits = own.entry.ne_limits.clone();
        let holds = HoldLog::new(work, telemetry);
        let training = OnlineTraining {
            own: own.clone(),
            progress: ExpertProgress::new(&own.dataset.schema, expert.tasks(), telemetry),
            gate: PublishGate::new(measured, last, limits, holds, telemetry)?,
            publisher: Publisher::open(
                engine.clone(),
                own.topic.clone(),
                config.publish.clone(),
                &work.join("published"),
            )?,
            registry: RegistryFollower::new(&**engine)?,
            orders: Some(feed.orders_position()),
            feed,
            expert,
            waiting: None,
            place,
            joined,
            asked_at: None,
            asked_position: None,
            failures: RepeatedFailures::default(),
            published: 0,
        };
        if saved_orders.is_none() {
            // Killed before the next save, it would carry out orders from another place on.
            training.save(false)?;
        }
        Ok(Some(training))
    }

    fn step(&mut self, wait: Duration, out: &mut dyn Write) -> Result<bool> {
        if self.asked_at.is_none() {
            self.asked_at = Some(clock::instant());
            if !self.publisher.has_snapshot() {
                self.ask(out)?;
            }
        }
        self.take_retries()?;
        let next = self.feed.next(wait)?;
        match next {
            FeedItem::Gap => {
                self.pass_gap(out)?;
                return Ok(true);
            }
            FeedItem::Stopped => return Ok(true),
            FeedItem::WindowRow(_) | FeedItem::Later | FeedItem::End => {}
        }
        let at_end = self.own.options.until_end && matches!(next, FeedItem::End);
        self.take(next, out)?;
        let most = self.most_rows();
        let full = |own: &PendingRows| own.rows() >= most;
        let waited =
            |own: &PendingRows| own.rows.rows() > 0 && clock::since(own.since) >= BATCH_WAIT;
        if let Some(rows) = self.waiting.take_if(|own| full(own) || at_end || waited(own)) {
            self.learn(rows, out)?;
        }
        let every = Duration::from_secs(self.own.config.publish.every_s);
        if !at_end
            && self.asked_at.is_none_or(|at| clock::since(at) >= every)
            && let Err(error) = self.ask(out)
            && self.failures.is_news(&error)
        {
            tracing::warn!(%error, "parameters could not be published; trying again later");
        }
        Ok(!at_end)
    }

    fn most_rows(&self) -> usize {
        self.own.config.expert_training.online_batch_rows
    }

    /// Adds what was read to the rows that wait.
    fn take(&mut self, next: FeedItem, out: &mut dyn Write) -> Result<()> {
        if let FeedItem::WindowRow(row) = next
            && self.is_own(&row)
        {
            let end = self.feed.place();
            // A step that a trainer would have to cut would leave it one of a few rows.
            let (rows, most) = (row.logged.example.targets.len(), self.most_rows());
            if let Some(before) = self.waiting.take_if(|own| own.rows() + rows > most) {
                self.learn(before, out)?;
            }
            let own = self.waiting.get_or_insert_with(|| PendingRows::new(end));
            own.end = end;
            own.add(row);
        } else if self.waiting.is_none() {
            self.move_to(self.feed.place());
        }
        Ok(())
    }

    /// Adds the rows that an operator had tried again, all to one step: it is saved whole or not at
    /// all.
    fn take_retries(&mut self) -> Result<()> {
        let mut rows = self.feed.retries()?;
        rows.retain(|row| self.is_own(row));
        for row in rows {
            let end = match self.place.position {
                FeedPosition::Logs(position) => FeedPlace::Logs(position),
                FeedPosition::Joined(_) => FeedPlace::Joined(self.joined.place()),
            };
            let own = self.waiting.get_or_insert_with(|| PendingRows::new(end));
            own.orders = Some(self.feed.orders_position());
            own.add(row);
        }
        Ok(())
    }

    /// Goes on behind missing records. What was read before is learned from, and where it goes on
    /// is saved before anything else is read.
    fn pass_gap(&mut self, out: &mut dyn Write) -> Result<()> {
        let before = self.waiting.take();
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
        !example.targets.is_empty() && self.own.surfaces.contains(&example.surface)
    }

    fn learn(&mut self, waiting: PendingRows, out: &mut dyn Write) -> Result<()> {
        let PendingRows { mut rows, corrections, ingested_ms, end, orders, .. } = waiting;
        let mut predictions = match rows.rows() {
            0 => Vec::new(),
            _ => self.expert.predict(rows.chunk())?,
        };
        let times = rows.examples().iter().map(|example| example.time_ms);
        let until_ms = times.fold(self.place.until_ms, i64::max);
        let first = rows.examples().len();
        // One step for both: what is corrected is nearly all of one label, and would take a step of
        // its own as far as all rows together take theirs.
        rows.append(corrections);
        let refused = self.expert.train(rows.chunk())?;
        self.gate.scheduled(&*self.expert);
        // Before the place moves past them.
        self.feed.set_aside(rows.unusable(&refused))?;
        let is_kept = |at: usize| refused.binary_search_by_key(&at, |own| own.index).is_err();
        let late = (first..rows.examples().len()).filter(|&at| is_kept(at)).count() as u64;
        if orders.is_some() {
            self.orders = orders;
            // What was tried again is new, although the place is not.
            self.asked_position = None;
        }
        rows.retain(first, is_kept, &mut predictions);
        if rows.rows() > 0 {
            self.progress.push(rows.examples(), &predictions);
            self.gate.measure(&mut *self.expert, rows.chunk(), &predictions)?;
        }
        let now_ms = now_ms();
        for ingested_ms in ingested_ms {
            self.place.ingested_ms = self.place.ingested_ms.max(ingested_ms);
            self.progress.learning.latency(now_ms - ingested_ms);
        }
        self.progress.learning.learned(0, late);
        self.move_to(end);
        self.place = ExpertCheckpoint {
            requests: self.place.requests + rows.examples().len() as u64,
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
        self.asked_at = Some(clock::instant());
        if self.asked_position == Some(position) {
            return Ok(());
        }
        let word = self.gate.ask(&*self.expert)?;
        match word.verdict {
            Verdict::Publish => {
                // What is saved is never behind what is published.
                self.save(true)?;
                self.publish(&word, out)?;
            }
            Verdict::Hold(_) => self.save(false)?,
            Verdict::RollBack(_) => {
                if let Some(last) = &self.gate.last {
                    self.expert.go_back(last)?;
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
        let trainer = self.expert.saved();
        let mean_loss = self.expert.mean_loss();
        let joined = self.joined.clone();
        let addition = StateAddition { orders: self.orders, mean_loss, joined };
        FollowerState { place: self.place, trainer, published, measured, addition }
            .write(&self.own.work)
    }

    fn publish(&mut self, word: &GateDecision, out: &mut dyn Write) -> Result<()> {
        let started = clock::instant();
        let facts = TrainingPosition {
            trained_position: self.place.position.number(),
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        let published = self.publisher.publish(self.expert.weights(), facts)?;
        self.published += 1;
        let saved = self.expert.saved();
        self.expert.set_published(&saved)?;
        self.gate.published(saved)?;
        self.register();
        let mut line = told(&published, json!(self.place.position), clock::since(started));
        line["evaluation"] = word.measured.clone();
        tell(out, &line)
    }

    fn register(&mut self) {
        let FollowedVersion { engine, entry, version, runtime, .. } = &*self.own;
        let describe =
            |registry: &Registry| runtime.describe(registry, version, self.expert.provenance());
        let (registry, failures) = (&mut self.registry, &mut self.failures);
        self_register_expert(registry, &**engine, &entry.name, version, describe, failures);
    }
}

#[cfg(test)]
mod tests;
