//! The logging tier over a stream in memory: crashes, versions, and what weights it may use.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hypercast_fm::{
    checkpoint::FmManifest,
    device::DeviceKind,
    example::{Example, Outcome},
    inference::{self, FmOutput},
    spec::FmConfig,
    trainer::{self, FmTrainer},
};

use hypercast_config::{Config, OnGap};
use hypercast_core::logging::RepeatedFailures;
use hypercast_data::dataset::Dataset;
use hypercast_stream::streams::StreamEngine;

use super::*;
use crate::fm::dataset_spec;
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::logs::{LogReader, LoggedRequest};
use hypercast_data::simulate;
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::registry::{RegistryClient, RegistryFollower, self_register_fm};
use hypercast_stream::streams::{
    Appender, GapCause, MemoryEngine, Reader, Record as Appended, StreamGap, StreamPlace,
    StreamRecord, Topic,
};

/// A world, its requests, and a configuration without a file.
fn world(dir: &Path) -> (Dataset, Config, Vec<Example>) {
    let into = dir.join("world");
    let options = simulate::SimulateOptions {
        into,
        users: 20,
        items: 30,
        requests: 150,
        surfaces: 2,
        seed: 3,
    };
    simulate::simulate(&options).unwrap();
    let dataset = Dataset::open(&options.into).unwrap();
    let fm = FmConfig {
        dim: 16,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        max_history: 16,
        ..FmConfig::default()
    };
    let mut config = Config { fm, ..Config::default() };
    config.paths.fm = dir.join("fm");
    config.paths.fm_work = dir.join("fm-work");
    config.paths.logs = dir.join("logs");
    config.logs.rows_per_file = 100;
    config.fm_logging.batch_candidates = 48;
    config.fm_logging.batch_wait_us = 0;
    let replay = ReplayOptions {
        span: Default::default(),
        history_len: 16,
        max_targets: 16,
        features: config.features,
    };
    let examples = Replay::new(&dataset, replay).unwrap().map(|read| read.unwrap()).collect();
    (dataset, config, examples)
}

fn fresh(dataset: &Dataset, config: &Config, work: &Path, seed: u64) -> Box<dyn FmTrainer> {
    let fm = FmConfig { seed, ..config.fm.clone() };
    trainer::create(work, &fm, &dataset_spec(dataset).unwrap(), DeviceKind::Cpu).unwrap()
}

fn append(engine: &MemoryEngine, records: &[JoinedRecord]) {
    let appender = engine.appender(&Topic::joined()).unwrap();
    for joined in records {
        let payload = postcard::to_stdvec(joined).unwrap();
        appender.append(&[Appended { id: 0, payload }]).unwrap();
    }
}

fn joined(examples: &[Example]) -> Vec<JoinedRecord> {
    let joined = |own: &Example| JoinedExample {
        example: own.clone(),
        ingested_ms: own.time_ms,
        ranked: Vec::new(),
    };
    examples.iter().map(|own| JoinedRecord::Example(joined(own))).collect()
}

fn checkpoint(version: &str, dir: &Path) -> ToLog {
    ToLog { version: version.into(), checkpoint: Some(dir.to_path_buf()), published: false }
}

fn run(
    dataset: &Dataset,
    config: &Config,
    engine: Arc<dyn StreamEngine>,
    to_log: Vec<ToLog>,
) -> Result<LoggingReport> {
    let options = LoggingOptions { until_end: true, metrics: None };
    let stop = Shutdown::default();
    let context = ServiceContext { dataset, config, engine };
    follow(context, &mut || Ok(to_log.clone()), options, &stop, &mut Vec::new())
}

fn logged(config: &Config, version: &str) -> Vec<LoggedRequest> {
    let log = LogReader::open_for(&config.paths.logs, Some(version)).unwrap();
    log.iter().map(|read| read.unwrap()).collect()
}

fn said(rows: &[LoggedRequest]) -> Vec<(u64, i64, Vec<u32>)> {
    let row = |own: &LoggedRequest| {
        let bits = own.tae.iter().map(|value| value.to_bits()).collect();
        (own.example.request, own.ingested_ms, bits)
    };
    rows.iter().map(row).collect()
}

/// An engine whose readers die where the record at a position comes.
struct Deadly {
    engine: Arc<MemoryEngine>,
    at: u64,
    /// What comes once a reader has found the end of the joined examples.
    grows: Arc<Mutex<Vec<JoinedRecord>>>,
}

struct DeadlyReader {
    reader: Box<dyn Reader>,
    engine: Arc<MemoryEngine>,
    at: u64,
    grows: Arc<Mutex<Vec<JoinedRecord>>>,
}

impl StreamEngine for Deadly {
    fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
        self.engine.appender(topic)
    }

    fn resume(
        &self,
        topic: &Topic,
        place: StreamPlace,
    ) -> hypercast_stream::Result<Box<dyn Reader>> {
        let (engine, grows) = (self.engine.clone(), self.grows.clone());
        Ok(Box::new(DeadlyReader {
            reader: engine.resume(topic, place)?,
            engine,
            at: self.at,
            grows,
        }))
    }

    fn span(&self, topic: &Topic) -> hypercast_stream::Result<std::ops::Range<u64>> {
        self.engine.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
        self.engine.trim(topic, before)
    }
}

impl Reader for DeadlyReader {
    fn next(&mut self, most: usize, wait: Duration) -> hypercast_stream::Result<Vec<StreamRecord>> {
        let room = self.at.saturating_sub(self.reader.position()) as usize;
        let records = self.reader.next(most.min(5).min(room.max(1)), wait)?;
        assert!(room > 0 || records.is_empty(), "killed");
        let more = std::mem::take(&mut *self.grows.lock().unwrap());
        if !records.is_empty() || more.is_empty() {
            *self.grows.lock().unwrap() = more;
            return Ok(records);
        }
        append(&self.engine, &more);
        self.next(most, wait)
    }

    fn position(&self) -> u64 {
        self.reader.position()
    }
}

#[test]
fn after_any_crash_the_rows_are_those_of_an_undisturbed_run() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, config, examples) = world(dir.path());
    fresh(&dataset, &config, &dir.path().join("a"), 1)
        .checkpoint(&config.paths.fm, "1.0.0")
        .unwrap();
    let engine = Arc::new(MemoryEngine::new(10));
    append(&engine, &joined(&examples));
    let to_log = || vec![checkpoint("1.0.0", &config.paths.fm)];
    let report = run(&dataset, &config, engine.clone(), to_log()).unwrap();
    assert_eq!((report.requests, report.position), (150, 150));
    let whole = said(&logged(&config, "1.0.0"));
    let fm = inference::load(&config.paths.fm, Default::default()).unwrap();
    let FmOutput { tae: expected, main } = fm.infer(&examples.iter().collect::<Vec<_>>()).unwrap();
    let rows = logged(&config, "1.0.0");
    let predictions: Vec<f32> = rows.iter().flat_map(|row| &row.predictions).copied().collect();
    assert!(!main.is_empty() && predictions.len() == main.len());
    assert!(predictions.iter().zip(&main).all(|(a, b)| (a - b).abs() < 1e-5));
    let found: Vec<f32> =
        whole.iter().flat_map(|row| &row.2).map(|&bits| f32::from_bits(bits)).collect();
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-5));

    let mut crashed = config.clone();
    crashed.paths.logs = dir.path().join("crashed");
    let mut deaths = 0;
    for at in [3, 4, 31, 47, 47, 90, 91, 120, 149, 150] {
        let deadly = Arc::new(Deadly { engine: engine.clone(), at, grows: Arc::default() });
        let run = AssertUnwindSafe(|| run(&dataset, &crashed, deadly, to_log()).unwrap());
        deaths += usize::from(catch_unwind(run).is_err());
    }
    assert_eq!(deaths, 9);
    let close = |a: &[u32], b: &[u32]| {
        a.len() == b.len()
            && a.iter().zip(b).all(|(&a, &b)| (f32::from_bits(a) - f32::from_bits(b)).abs() < 1e-5)
    };
    let rows = said(&logged(&crashed, "1.0.0"));
    assert_eq!(rows.len(), whole.len());
    for (a, b) in rows.iter().zip(&whole) {
        assert_eq!((a.0, a.1), (b.0, b.1));
        assert!(close(&a.2, &b.2), "request {}", a.0);
    }
}

#[test]
fn missing_records_are_passed_once_by_a_killed_tier() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, mut config, examples) = world(dir.path());
    config.engine.on_gap = OnGap::Continue;
    fresh(&dataset, &config, &dir.path().join("a"), 1)
        .checkpoint(&config.paths.fm, "1.0.0")
        .unwrap();
    let to_log = || vec![checkpoint("1.0.0", &config.paths.fm)];
    let engine = Arc::new(MemoryEngine::new(10));
    append(&engine, &joined(&examples[..60]));
    run(&dataset, &config, engine, to_log()).unwrap();
    // A stream that is shorter now, and grows past where the tier had stood.
    let engine = Arc::new(MemoryEngine::new(10));
    append(&engine, &joined(&examples[60..100]));
    let grows = Arc::new(Mutex::new(joined(&examples[100..150])));
    let deadly = Arc::new(Deadly { engine: engine.clone(), at: 70, grows });
    // Nothing but the gap is in a complete file.
    config.logs.rows_per_file = 1_000_000;
    let killed = AssertUnwindSafe(|| run(&dataset, &config, deadly, to_log()).unwrap());
    assert!(catch_unwind(killed).is_err());
    let report = run(&dataset, &config, engine, to_log()).unwrap();
    assert_eq!((report.requests, report.position), (90, 90));
    let requests: Vec<u64> =
        logged(&config, "1.0.0").iter().map(|row| row.example.request).collect();
    let expected = examples[..150].iter();
    assert_eq!(requests, expected.map(|own| own.request).collect::<Vec<_>>());
}

/// An engine that once sends a reader back to its first record.
struct Rewound {
    engine: Arc<MemoryEngine>,
    at: u64,
    is_over: Arc<AtomicBool>,
}

struct RewoundReader {
    reader: Box<dyn Reader>,
    at: u64,
    is_over: Arc<AtomicBool>,
}

impl StreamEngine for Rewound {
    fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
        self.engine.appender(topic)
    }

    fn resume(
        &self,
        topic: &Topic,
        place: StreamPlace,
    ) -> hypercast_stream::Result<Box<dyn Reader>> {
        let reader = self.engine.resume(topic, place)?;
        if *topic != Topic::joined() {
            return Ok(reader);
        }
        Ok(Box::new(RewoundReader { reader, at: self.at, is_over: self.is_over.clone() }))
    }

    fn span(&self, topic: &Topic) -> hypercast_stream::Result<std::ops::Range<u64>> {
        self.engine.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
        self.engine.trim(topic, before)
    }
}

impl Reader for RewoundReader {
    fn next(&mut self, most: usize, wait: Duration) -> hypercast_stream::Result<Vec<StreamRecord>> {
        let position = self.reader.position();
        if position >= self.at && !self.is_over.swap(true, Ordering::Relaxed) {
            let (topic, cause) = (Topic::joined(), GapCause::Deleted { first: 0 });
            return Err(hypercast_stream::Error::Gap(StreamGap { topic, position, cause }));
        }
        self.reader.next(most.min(5), wait)
    }

    fn position(&self) -> u64 {
        self.reader.position()
    }
}

#[test]
fn every_version_in_use_is_logged_and_corrections_too() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, config, examples) = world(dir.path());
    let second = dir.path().join("fm-2");
    fresh(&dataset, &config, &dir.path().join("a"), 1)
        .checkpoint(&config.paths.fm, "1.0.0")
        .unwrap();
    fresh(&dataset, &config, &dir.path().join("b"), 2).checkpoint(&second, "2.0.0").unwrap();
    let engine = Arc::new(MemoryEngine::new(10));
    append(&engine, &joined(&examples[..50]));
    let first = checkpoint("1.0.0", &config.paths.fm);
    run(&dataset, &config, engine.clone(), vec![first.clone()]).unwrap();
    append(&engine, &joined(&examples[50..]));
    let mut late = examples[0].clone();
    late.targets[0].outcome = Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN };
    late.targets.truncate(1);
    let late = JoinedExample { example: late, ingested_ms: 9, ranked: Vec::new() };
    append(&engine, &[JoinedRecord::Correction(late)]);
    let both = vec![first, checkpoint("2.0.0", &second)];
    let report = run(&dataset, &config, engine, both).unwrap();
    assert_eq!((report.requests, report.position), (101, 151));
    let (first, second) = (logged(&config, "1.0.0"), logged(&config, "2.0.0"));
    assert_eq!((first.len(), second.len()), (150, 100));
    assert_eq!(first[0].example.targets[0].outcome.actions & 1, 1, "the correction is applied");
    for (a, b) in first[50..].iter().zip(&second) {
        assert_eq!(a.example.request, b.example.request);
        assert_ne!(a.tae, b.tae);
    }
}

/// A checkpoint, and weights of the same version that had learned from the first 80 requests.
struct TwoWeights {
    dataset: Dataset,
    config: Config,
    examples: Vec<Example>,
    new: Box<dyn FmTrainer>,
    old_taes: Vec<f32>,
    new_taes: Vec<f32>,
}

impl TwoWeights {
    fn new(dir: &Path) -> TwoWeights {
        let (dataset, config, examples) = world(dir);
        let mut old = fresh(&dataset, &config, &dir.join("a"), 1);
        old.checkpoint(&config.paths.fm, "1.0.0").unwrap();
        let new_dir = dir.join("new");
        let mut new = fresh(&dataset, &config, &dir.join("b"), 1);
        let learned: Vec<&Example> = examples[..80].iter().collect();
        learned.chunks(16).for_each(|batch| drop(new.step(batch).unwrap()));
        new.checkpoint(&new_dir, "1.0.0").unwrap();
        let of = |dir: &Path| {
            let fm = inference::load(dir, Default::default()).unwrap();
            let references: Vec<&Example> = examples.iter().collect();
            fm.infer(&references).unwrap().tae
        };
        let (old_taes, new_taes) = (of(&config.paths.fm), of(&new_dir));
        assert!(examples.iter().all(|own| own.targets.len() == examples[0].targets.len()));
        TwoWeights { dataset, config, examples, new, old_taes, new_taes }
    }

    /// Streams with some of the examples, and the new weights published.
    fn streams(&mut self, range: std::ops::Range<usize>, dir: &Path) -> Arc<MemoryEngine> {
        let engine = Arc::new(MemoryEngine::new(10));
        append(&engine, &joined(&self.examples[range]));
        let settings = self.config.publish.clone();
        let mut publisher =
            Publisher::open(engine.clone(), Topic::fm("1.0.0"), settings, dir).unwrap();
        let times = self.examples[..80].iter().map(|example| example.time_ms);
        let facts = TrainingPosition {
            trained_position: 80,
            trained_until_ms: times.max().unwrap(),
            ..TrainingPosition::default()
        };
        publisher.publish(&self.new.trained_weights("1.0.0").unwrap(), facts).unwrap();
        engine
    }

    /// The rows that a tier logs in a folder of its own.
    fn log(&mut self, engine: Arc<dyn StreamEngine>, logs: &Path) -> Vec<LoggedRequest> {
        self.config.paths.logs = logs.to_path_buf();
        let mut registered = Registered::new(&*engine, &self.config.paths.fm).unwrap();
        let options = LoggingOptions { until_end: true, metrics: None };
        let streams = engine.clone();
        let context = ServiceContext { dataset: &self.dataset, config: &self.config, engine };
        let mut active = || registered.to_log(&*streams);
        follow(context, &mut active, options, &Shutdown::default(), &mut Vec::new()).unwrap();
        logged(&self.config, "1.0.0")
    }

    /// Whether the TAEs of a row are those of an example by the old and by the new weights.
    fn is_of(&self, row: &LoggedRequest, example: usize) -> [bool; 2] {
        assert_eq!(row.example.request, self.examples[example].request);
        let values = self.examples[0].targets.len() * self.config.fm.tae_width();
        let own = example * values..(example + 1) * values;
        [&self.old_taes, &self.new_taes]
            .map(|taes| row.tae.iter().zip(&taes[own.clone()]).all(|(a, b)| (a - b).abs() < 1e-4))
    }

    /// Requests that go through the FM together.
    fn pass(&self) -> usize {
        self.config.fm_logging.batch_candidates / self.examples[0].targets.len()
    }
}

const OLD: [bool; 2] = [true, false];
const NEW: [bool; 2] = [false, true];

#[test]
fn weights_are_used_only_past_what_they_had_learned() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = TwoWeights::new(dir.path());
    let engine = world.streams(0..150, &dir.path().join("published"));
    let rows = world.log(engine, &dir.path().join("logs"));
    assert!((0..80).all(|at| world.is_of(&rows[at], at) == OLD));
    // A pass that began before position 80 keeps the old weights to its end.
    assert!((80 + world.pass()..150).all(|at| world.is_of(&rows[at], at) == NEW));
}

#[test]
fn what_comes_again_gets_no_weights_that_had_learned_from_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = TwoWeights::new(dir.path());
    world.config.engine.on_gap = OnGap::Continue;
    let engine = world.streams(0..150, &dir.path().join("published"));
    let rewound = Rewound { engine, at: 150, is_over: Arc::default() };
    let rows = world.log(Arc::new(rewound), &dir.path().join("logs"));
    assert_eq!(rows.len(), 300, "all come twice");
    assert!((0..80).all(|at| world.is_of(&rows[150 + at], at) == OLD));
    assert!((80 + world.pass()..150).all(|at| world.is_of(&rows[150 + at], at) == NEW));

    // In a stream that was made anew, what they had not learned from has early positions.
    let engine = world.streams(80..150, &dir.path().join("published-anew"));
    let rows = world.log(engine, &dir.path().join("logs-anew"));
    assert!((0..70).all(|at| world.is_of(&rows[at], 80 + at) == NEW));
}

#[test]
fn the_configured_version_is_logged_as_long_as_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, config, _) = world(dir.path());
    fresh(&dataset, &config, &dir.path().join("a"), 1)
        .checkpoint(&config.paths.fm, "1.0.0")
        .unwrap();
    let engine = MemoryEngine::new(10);
    let mut registered = Registered::new(&engine, &config.paths.fm).unwrap();
    let mut logged = || {
        let own = registered.to_log(&engine).unwrap().into_iter();
        own.map(|own| (own.version, own.checkpoint.is_some())).collect::<Vec<_>>()
    };
    let configured = ("1.0.0".to_owned(), true);
    assert_eq!(logged(), std::slice::from_ref(&configured));
    // Trainers that register what they train change nothing.
    let versions = RegistryClient::new(&engine);
    let manifest = FmManifest::read(&config.paths.fm).unwrap();
    let newer = FmManifest { version: "2.0.0".into(), ..manifest.clone() };
    for manifest in [&manifest, &newer] {
        let mut registry = RegistryFollower::new(&engine).unwrap();
        let mut failures = RepeatedFailures::default();
        self_register_fm(&mut registry, &engine, manifest, &dataset.schema, &mut failures);
    }
    assert_eq!(versions.read().unwrap().fms().len(), 2);
    assert_eq!(logged(), std::slice::from_ref(&configured));
    // One that is promoted is logged beside it, since the configured experts learn with the other.
    versions.decide(|registry| registry.promote_fm("2.0.0")).unwrap();
    assert_eq!(logged(), [("2.0.0".to_owned(), false), configured]);
    // Of a version that is in both, the registry has the weights.
    versions.decide(|registry| registry.promote_fm("1.0.0")).unwrap();
    assert_eq!(logged(), [("1.0.0".to_owned(), false), ("2.0.0".to_owned(), false)]);
}

#[test]
fn a_tier_that_is_asked_to_stop_while_streams_are_waited_for_completes_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, config, examples) = world(dir.path());
    fresh(&dataset, &config, &dir.path().join("a"), 1)
        .checkpoint(&config.paths.fm, "1.0.0")
        .unwrap();
    let engine = Arc::new(MemoryEngine::new(10));
    append(&engine, &joined(&examples[..50]));
    let stop = Shutdown::default();
    let mut first = Some(vec![checkpoint("1.0.0", &config.paths.fm)]);
    let mut active = || {
        first.take().ok_or_else(|| {
            stop.request();
            Error::unreachable("the decisions have not come, and the process is to stop")
        })
    };
    let options = LoggingOptions { until_end: false, metrics: None };
    let context = ServiceContext { dataset: &dataset, config: &config, engine };
    let report = follow(context, &mut active, options, &stop, &mut Vec::new()).unwrap();
    assert_eq!((report.position, logged(&config, "1.0.0").len()), (50, 50));
}

#[test]
fn a_second_tier_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, config, _) = world(dir.path());
    let _owner = DirLock::acquire(&config.paths.logs).unwrap();
    let error =
        run(&dataset, &config, Arc::new(MemoryEngine::new(1)), vec![]).unwrap_err().to_string();
    assert!(error.contains(&std::process::id().to_string()), "{error}");
}
