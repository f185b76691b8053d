//! An expert's trainer as a service: it follows the feature logs as files appear, learns online, publishes, and saves
//! where it stands.
//!
//! Rows are predicted before they are learned from. A correction is learned from too, its changed outcomes alone,
//! and is in no metric. A trainer that begins learns from the logs that are there as `train expert` does, in passes,
//! and goes on behind the stream. It needs neither the FM's trainer nor a daemon. Nothing is saved between publications:
//! what was learned since is learned again.

mod feed;
mod progress;
mod state;

use std::{
    io::Write,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_fm::example::Example;
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use self::feed::FeedPosition;
use self::{
    feed::{Computed, Feed, Next},
    progress::Progress,
    state::State,
};
use super::{
    materialise,
    stream::{ExpertStream, Load, LogView, Start},
    tell::{tell, told},
};
use crate::{
    clock::now_ms,
    config::{Config, ExpertEntry},
    dataset::{Dataset, timeline::Span},
    engine::{Engine, Topic},
    error::{Error, Result},
    expert::{self, Chunk},
    logs::{LogFollower, LogReader, Logged},
    owner::Owner,
    publish::{Facts, Publisher},
    stop::Stop,
    telemetry::Telemetry,
};

/// How long the first row of a step waits for others.
const BATCH_WAIT: Duration = Duration::from_millis(500);

/// How often it looks for rows, and whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What to follow, and how.
#[derive(Debug, Clone, Default)]
pub struct FollowOptions {
    /// The version that is trained: it names the stream of weights and the work folder; the plugin's own if missing.
    pub version: Option<String>,
    /// The FM version whose TAEs it learns with; if missing, the one that the logs hold.
    pub fm: Option<String>,
    /// Surfaces to learn from, by name; if none, those of the configuration.
    pub surfaces: Vec<String>,
    /// A checkpoint that gives TAEs on the spot, for the joined examples themselves instead of the logs.
    pub fm_checkpoint: Option<PathBuf>,
    /// Where to answer `/metrics`.
    pub metrics: Option<SocketAddr>,
    /// Stop at the end of what is there.
    pub until_end: bool,
}

/// Where a trainer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// After the last row learned from.
    pub position: FeedPosition,
    /// Requests learned from behind the stream.
    pub requests: u64,
    /// Corrections learned from.
    pub corrections: u64,
    /// Time of the newest request, milliseconds since the epoch.
    pub until_ms: i64,
    /// When the newest event was taken in, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// What a trainer did since it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FollowReport {
    /// Where it stands; none if there was nothing to begin with.
    pub place: Option<Place>,
    /// Publications.
    pub published: u64,
}

/// What an expert is trained from and with.
#[derive(Clone, Copy)]
pub struct Ground<'a> {
    /// The data set: its content vectors, and the past where TAEs are computed on the spot.
    pub dataset: &'a Dataset,
    /// The configuration.
    pub config: &'a Config,
    /// The expert.
    pub entry: &'a ExpertEntry,
    /// Where guests run.
    pub guests: &'a expert::Engine,
}

/// Follows until it is asked to stop; then it has saved and published. Lines of JSON go to `out`.
///
/// # Errors
/// A work folder that another process has, a saved state that is damaged or of another network, a plugin that is refused or
/// faults, a full disk.
pub fn follow(
    ground: Ground<'_>,
    engine: Arc<dyn Engine>,
    options: &FollowOptions,
    (stop, out): (&Stop, &mut dyn Write),
) -> Result<FollowReport> {
    let Ground { config, entry, .. } = ground;
    let version = match &options.version {
        Some(version) => version.clone(),
        None => plugin_version(ground)?,
    };
    let work = work_dir(config, entry, &version);
    let _owner = Owner::take(&work)?;
    let Some(begun) = begin(ground, &engine, (options, &work), stop)? else {
        return Ok(FollowReport { place: None, published: 0 });
    };
    let telemetry = Arc::new(Telemetry::default());
    let progress = Progress::new(&begun.schema, &begun.blueprint, &telemetry);
    if let Some(address) = options.metrics {
        let address = telemetry.serve(address)?;
        tell(out, &json!({ "kind": "metrics", "address": format!("http://{address}/metrics") }))?;
    }
    let topic = Topic::expert(&entry.name, &version);
    let publisher =
        Publisher::open(engine, topic, config.publish.clone(), &work.join("published"))?;
    let following = Following {
        config,
        work,
        feed: begun.feed,
        surfaces: begun.surfaces,
        stream: begun.stream,
        place: begun.place,
        publisher,
        progress,
        published_at: Instant::now(),
        published_position: None,
        published: 0,
    };
    following.run(options, (stop, out))
}

/// The work folder of a version's trainer.
pub fn work_dir(config: &Config, entry: &ExpertEntry, version: &str) -> PathBuf {
    config.paths.experts.join(&entry.name).join("follow").join(version)
}

fn plugin_version(ground: Ground<'_>) -> Result<String> {
    let Ground { dataset, config, entry, guests } = ground;
    let options = config.plugin_limits.load_options();
    let blueprint = expert::Blueprint::load(guests, &entry.plugin, &dataset.schema, &options)?;
    Ok(blueprint.description.version.clone())
}

/// What there is to go on with.
struct Begun {
    schema: Arc<crate::schema::Schema>,
    blueprint: Arc<expert::Blueprint>,
    stream: ExpertStream,
    feed: Feed,
    surfaces: Vec<u16>,
    place: Place,
}

/// Where this version stands, or what it makes of the past. None if it was asked to stop before there was one.
fn begin(
    ground: Ground<'_>,
    engine: &Arc<dyn Engine>,
    (options, work): (&FollowOptions, &Path),
    stop: &Stop,
) -> Result<Option<Begun>> {
    let Ground { dataset, config, entry, .. } = ground;
    let surfaces = match options.surfaces.is_empty() {
        true => config.training_surfaces(entry, &dataset.schema)?,
        false => {
            let own = ExpertEntry { surfaces: options.surfaces.clone(), ..entry.clone() };
            let own = ExpertEntry { train_on: crate::config::TrainOn::Own, ..own };
            config.training_surfaces(&own, &dataset.schema)?
        }
    };
    let found = match State::read(work)? {
        Some(state) => Some(resume(ground, state)?),
        None => learn_past(ground, engine, (options, &surfaces, work), stop)?,
    };
    let Some((blueprint, stream, place)) = found else { return Ok(None) };
    let fm = stream.parameters().provenance.fm_version.clone();
    if let Some(asked) = options.fm.as_ref().filter(|asked| **asked != fm) {
        return Err(Error::data(
            work,
            format!("this version learns with FM {fm}, not {asked}; give another --version"),
        ));
    }
    let feed = match (place.position, &options.fm_checkpoint) {
        (FeedPosition::Logs(from), None) => {
            Feed::Logs(Box::new(LogFollower::open(&config.paths.logs, &fm, from)?))
        }
        (FeedPosition::Joined(from), Some(checkpoint)) => {
            let from = (Some(from), surfaces.clone());
            let ground = (dataset, config);
            Feed::Computed(Box::new(Computed::open(ground, engine.clone(), checkpoint, from)?))
        }
        _ => {
            return Err(Error::data(
                work,
                "it has followed the logs and is to follow a checkpoint, or the reverse; give another --version",
            ));
        }
    };
    let schema = dataset.schema.clone();
    Ok(Some(Begun { schema, blueprint, stream, feed, surfaces, place }))
}

type Found = (Arc<expert::Blueprint>, ExpertStream, Place);

fn resume(ground: Ground<'_>, state: State) -> Result<Found> {
    let Ground { dataset, config, entry, guests } = ground;
    let provenance = state.trainer.provenance();
    let options = expert::LoadOptions {
        tae_dim: provenance.tae_dim,
        fm_version: Some(provenance.fm_version.clone()),
        ..config.plugin_limits.load_options()
    };
    let blueprint = expert::Blueprint::load(guests, &entry.plugin, &dataset.schema, &options)?;
    let blueprint = Arc::new(blueprint);
    let start = start(ground, 0);
    let stream = ExpertStream::resume(blueprint.clone(), state.trainer, &start)?;
    Ok((blueprint, stream, state.place))
}

fn start<'a>(ground: Ground<'a>, rows: u64) -> Start<'a> {
    Start {
        settings: &ground.config.expert_training,
        rows,
        without_tae: ground.entry.without_tae,
        device: ground.config.device,
    }
}

/// Learns from the logs that are there, for which it waits, or from the data set with TAEs of the checkpoint.
fn learn_past(
    ground: Ground<'_>,
    engine: &Arc<dyn Engine>,
    (options, surfaces, work): (&FollowOptions, &[u16], &Path),
    stop: &Stop,
) -> Result<Option<Found>> {
    let Ground { dataset, config, entry, guests } = ground;
    // The past ends where the stream begins.
    let (logs, joined) = match &options.fm_checkpoint {
        Some(checkpoint) => {
            let begin = engine.span(&Topic::joined())?.start;
            let logs = work.join("past");
            materialise::past(dataset, config, (checkpoint, &logs))?;
            (logs, Some(begin))
        }
        None => (config.paths.logs.clone(), None),
    };
    let mut said = false;
    let (log, survey) = loop {
        if let Some(log) = opened(&logs, options)? {
            let view = view(&log, surfaces);
            if let Some(survey) = view.survey()? {
                break (log, survey);
            }
        }
        if stop.is_asked() || options.until_end {
            return Ok(None);
        }
        if !said {
            tracing::warn!(
                "{}: no rows of expert {} yet; it waits for them",
                logs.display(),
                entry.name
            );
            said = true;
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let view = view(&log, surfaces);
    let load = Load { engine: guests, plugin: &entry.plugin, name: &entry.name };
    let blueprint =
        load.blueprint(&view, &survey.fm_version, config.plugin_limits.load_options())?;
    let seed = config.expert_training.seed;
    let parameters = blueprint.init_parameters(survey.statistics.finish(), seed);
    let mut stream = ExpertStream::new(blueprint.clone(), parameters, &start(ground, survey.rows))?;
    let mut until_ms = i64::MIN;
    stream.learn_past(&view, |report| {
        until_ms = report.examples.iter().map(|own| own.time_ms).fold(until_ms, i64::max);
    })?;
    stream.go_online();
    let position = match joined {
        Some(position) => FeedPosition::Joined(position),
        None => FeedPosition::Logs(log.end()),
    };
    if joined.is_some() {
        super::fm::remove_dir(&logs)?;
    }
    let place = Place { position, requests: 0, corrections: 0, until_ms, ingested_ms: 0 };
    Ok(Some((blueprint, stream, place)))
}

/// The logs, if there are any yet.
fn opened(logs: &Path, options: &FollowOptions) -> Result<Option<LogReader>> {
    if !logs.join("log-manifest.json").is_file() {
        return Ok(None);
    }
    let asked = options.fm.as_deref().filter(|_| options.fm_checkpoint.is_none());
    match asked {
        Some(asked) if !LogReader::versions(logs)?.iter().any(|own| own.version == asked) => {
            Ok(None)
        }
        _ => LogReader::open_for(logs, asked).map(Some),
    }
}

fn view<'a>(log: &'a LogReader, surfaces: &[u16]) -> LogView<'a> {
    LogView { log, surfaces: surfaces.to_vec(), span: Span::default(), embedding: None }
}

struct Following<'a> {
    config: &'a Config,
    work: PathBuf,
    feed: Feed,
    surfaces: Vec<u16>,
    stream: ExpertStream,
    place: Place,
    publisher: Publisher,
    progress: Progress,
    published_at: Instant,
    /// Where it stood when it published last.
    published_position: Option<FeedPosition>,
    published: u64,
}

/// Rows that are learned from together.
#[derive(Default)]
struct Batch {
    examples: Vec<Example>,
    tae: Vec<f32>,
    rows: usize,
}

impl Batch {
    fn add(&mut self, logged: Logged) {
        self.rows += logged.example.targets.len();
        self.tae.extend_from_slice(&logged.tae);
        self.examples.push(logged.example);
    }

    fn append(&mut self, mut other: Batch) {
        self.rows += other.rows;
        self.tae.append(&mut other.tae);
        self.examples.append(&mut other.examples);
    }

    fn chunk(&self) -> Chunk<'_> {
        Chunk { examples: &self.examples, tae: &self.tae }
    }
}

/// Rows and corrections that wait to be learned from.
struct Waiting {
    rows: Batch,
    corrections: Batch,
    ingested_ms: Vec<i64>,
    since: Instant,
    /// After the last of them.
    position: FeedPosition,
}

impl Following<'_> {
    fn run(
        mut self,
        options: &FollowOptions,
        (stop, out): (&Stop, &mut dyn Write),
    ) -> Result<FollowReport> {
        let most = self.config.expert_training.online_batch_rows;
        let every = Duration::from_secs(self.config.publish.every_s);
        if !self.publisher.has_snapshot() {
            self.save()?;
            self.publish(out)?;
        }
        let mut waiting = None::<Waiting>;
        while !stop.is_asked() {
            let next = self.feed.next(LOOK_EVERY)?;
            let at_end = options.until_end && matches!(next, Next::End);
            if let Next::Row(logged) = next
                && self.is_own(&logged)
            {
                let position = self.feed.position();
                // A step that a trainer would have to cut would leave it one of a few rows.
                let rows = logged.example.targets.len();
                if waiting.as_ref().is_some_and(|own| own.rows() + rows > most) {
                    self.learn(waiting.take().expect("it is there"), out)?;
                }
                let own = waiting.get_or_insert_with(|| Waiting::new(position));
                own.add(logged, position);
            } else if waiting.is_none() {
                self.place.position = self.feed.position();
            }
            let full = |own: &Waiting| own.rows() >= most;
            let waited = |own: &Waiting| own.rows.rows > 0 && own.since.elapsed() >= BATCH_WAIT;
            let ready = |own: &Waiting| full(own) || at_end || waited(own);
            if waiting.as_ref().is_some_and(ready) {
                self.learn(waiting.take().expect("it is there"), out)?;
            }
            if at_end {
                break;
            }
            if self.published_at.elapsed() >= every {
                self.save()?;
                self.publish_or_warn(out)?;
            }
        }
        self.save()?;
        self.publish(out)?;
        Ok(FollowReport { place: Some(self.place), published: self.published })
    }

    fn is_own(&self, logged: &Logged) -> bool {
        !logged.example.targets.is_empty() && self.surfaces.contains(&logged.example.surface)
    }

    fn learn(&mut self, waiting: Waiting, out: &mut dyn Write) -> Result<()> {
        let Waiting { mut rows, corrections, ingested_ms, position, .. } = waiting;
        if rows.rows > 0 {
            let predictions = self.stream.predict(rows.chunk())?;
            self.progress.push(&rows.examples, &predictions);
        }
        let times = rows.examples.iter().map(|example| example.time_ms);
        let until_ms = times.fold(self.place.until_ms, i64::max);
        let (requests, late) = (rows.examples.len() as u64, corrections.examples.len() as u64);
        // One step for both: what is corrected is nearly all of one label, and would take a step of its own as far as
        // all rows together take theirs.
        rows.append(corrections);
        self.stream.learn(rows.chunk())?;
        let now_ms = now_ms();
        for ingested_ms in ingested_ms {
            self.place.ingested_ms = self.place.ingested_ms.max(ingested_ms);
            self.progress.latency(now_ms - ingested_ms);
        }
        self.progress.corrected(late);
        self.place = Place {
            position,
            requests: self.place.requests + requests,
            corrections: self.place.corrections + late,
            until_ms,
            ..self.place
        };
        match self.progress.line(&self.place) {
            Some(line) => tell(out, &line),
            None => Ok(()),
        }
    }

    fn save(&self) -> Result<()> {
        let state = State { place: self.place, trainer: self.stream.saved() };
        state.write(&self.work)
    }

    /// Parameters that cannot be published now are published later.
    fn publish_or_warn(&mut self, out: &mut dyn Write) -> Result<()> {
        if let Err(error) = self.publish(out) {
            tracing::warn!(%error, "parameters could not be published; trying again later");
        }
        Ok(())
    }

    fn publish(&mut self, out: &mut dyn Write) -> Result<()> {
        let started = Instant::now();
        self.published_at = started;
        if self.published_position == Some(self.place.position) {
            return Ok(());
        }
        let facts = Facts {
            trained_position: self.place.position.number(),
            trained_until_ms: self.place.until_ms,
            ingested_ms: self.place.ingested_ms,
        };
        let published = self.publisher.publish(self.stream.parameters(), facts)?;
        self.published_position = Some(self.place.position);
        self.published += 1;
        let position = json!(self.place.position);
        tell(out, &told(&published, position, started.elapsed()))
    }
}

impl Waiting {
    fn new(position: FeedPosition) -> Waiting {
        let (rows, corrections) = (Batch::default(), Batch::default());
        Waiting { rows, corrections, ingested_ms: Vec::new(), since: Instant::now(), position }
    }

    fn rows(&self) -> usize {
        self.rows.rows + self.corrections.rows
    }

    fn add(&mut self, logged: Logged, position: FeedPosition) {
        self.position = position;
        match logged.correction {
            true => self.corrections.add(logged),
            false => {
                self.ingested_ms.extend(Some(logged.ingested_ms).filter(|&ms| ms > 0));
                self.rows.add(logged);
            }
        }
    }
}

#[cfg(test)]
mod tests;
