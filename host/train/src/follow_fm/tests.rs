//! A trainer that is interrupted and begins again ends where one ends that never was.

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Mutex,
};

use hypercast_fm::{inference, inference::FmServingOptions, spec::FmConfig, trainer};

mod content;
mod gated;
mod publishing;
mod restarts;

use super::*;
use hypercast_config::PublishSettings;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::simulate;
use hypercast_stream::dead_letters::{self, DeadLetterQueue, LetterScope, UnusableRecord};
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::publish;
use hypercast_stream::registry::{RegistryClient, VersionState, WeightsLocation};
use hypercast_stream::streams::Reader;
use hypercast_stream::streams::{Appender, MemoryEngine, Record, StreamPlace, StreamRecord};

/// Streams of which a reader of joined examples stops its trainer at a position, or crashes it.
struct Cut {
    inner: Arc<MemoryEngine>,
    at: u64,
    stop: Option<Shutdown>,
    /// What comes once a reader has found the end of the joined examples.
    grows: Arc<Mutex<Vec<Record>>>,
}

struct CutReader {
    inner: Box<dyn Reader>,
    joined: Arc<dyn Appender>,
    at: u64,
    stop: Option<Shutdown>,
    grows: Arc<Mutex<Vec<Record>>>,
}

impl StreamEngine for Cut {
    fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
        self.inner.appender(topic)
    }

    fn resume(
        &self,
        topic: &Topic,
        place: StreamPlace,
    ) -> hypercast_stream::Result<Box<dyn Reader>> {
        let inner = self.inner.resume(topic, place)?;
        if *topic != Topic::joined() {
            return Ok(inner);
        }
        let (joined, grows) = (self.inner.appender(topic)?, self.grows.clone());
        Ok(Box::new(CutReader { inner, joined, at: self.at, stop: self.stop.clone(), grows }))
    }

    fn span(&self, topic: &Topic) -> hypercast_stream::Result<Range<u64>> {
        self.inner.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
        self.inner.trim(topic, before)
    }
}

impl Reader for CutReader {
    fn next(&mut self, most: usize, wait: Duration) -> hypercast_stream::Result<Vec<StreamRecord>> {
        if self.inner.position() >= self.at {
            self.stop.as_ref().expect("the trainer crashes here").request();
        }
        let records = self.inner.next(most.min(5), wait)?;
        let more = std::mem::take(&mut *self.grows.lock().unwrap());
        if !records.is_empty() || more.is_empty() {
            *self.grows.lock().unwrap() = more;
            return Ok(records);
        }
        self.joined.append(&more)?;
        self.inner.next(most.min(5), wait)
    }

    fn position(&self) -> u64 {
        self.inner.position()
    }
}

/// A data set, and its requests.
fn examples(dir: &Path, requests: usize) -> (Dataset, Vec<Example>) {
    let into = dir.join("data");
    let options = simulate::SimulateOptions {
        into: into.clone(),
        users: 30,
        items: 60,
        requests,
        surfaces: 2,
        seed: 3,
    };
    simulate::simulate(&options).unwrap();
    let dataset = Dataset::open(&into).unwrap();
    let options = ReplayOptions {
        span: Span { from_ms: None, until_ms: None },
        history_len: 8,
        max_targets: 32,
        features: Config::default().features,
    };
    let examples = Replay::new(&dataset, options).unwrap().map(|read| read.unwrap()).collect();
    (dataset, examples)
}

/// A data set, and its requests as a joiner would tell them, some with a late outcome.
fn world(dir: &Path) -> (Dataset, Vec<Record>) {
    let (dataset, examples) = examples(dir, 300);
    let mut records = Vec::new();
    for example in examples {
        let mut late = example.clone();
        late.targets.truncate(1);
        late.targets[0].outcome.known &= 1;
        let joined = |example: Example| JoinedExample {
            ingested_ms: example.time_ms,
            example,
            ranked: Vec::new(),
        };
        let is_late = example.request % 7 == 0;
        let mut tell = |joined: &JoinedRecord| {
            records.push(Record { id: 0, payload: postcard::to_stdvec(joined).unwrap() });
        };
        tell(&JoinedRecord::Example(joined(example)));
        if is_late {
            tell(&JoinedRecord::Correction(joined(late)));
        }
    }
    (dataset, records)
}

fn config(work: &Path) -> Config {
    let fm = FmConfig {
        dim: 16,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        max_history: 8,
        batch_requests: 16,
        save_every_requests: 50,
        dropout: 0.1,
        ..FmConfig::default()
    };
    let mut config = Config { fm, ..Config::default() };
    config.paths.fm_work = work.to_path_buf();
    config.publish = PublishSettings { every_s: 1000, share: 1.0, ..config.publish };
    config
}

fn streams(records: &[Record]) -> Arc<MemoryEngine> {
    let memory = Arc::new(MemoryEngine::default());
    memory.appender(&Topic::joined()).unwrap().append(records).unwrap();
    memory
}

fn options() -> FollowFmOptions {
    FollowFmOptions { version: "1.0.0".into(), from: None, metrics: None, until_end: true }
}

fn run(
    dataset: &Dataset,
    config: &Config,
    engine: Arc<dyn StreamEngine>,
    stop: &Shutdown,
) -> FollowFmReport {
    let context = ServiceContext { dataset, config, engine };
    follow(context, &options(), stop, &mut std::io::sink()).unwrap()
}

#[test]
fn an_interrupted_trainer_is_one_that_never_was() {
    // So few requests leave an FM that is no better than the base rate, which is published here all
    // the same.
    let config = |work: &Path| {
        let mut config = config(work);
        config.fm_gate.rows = 0;
        config
    };
    let dir = tempfile::tempdir().unwrap();
    let (dataset, records) = world(dir.path());
    let whole = config(&dir.path().join("whole"));
    let engine = streams(&records);
    let report = run(&dataset, &whole, engine.clone(), &Shutdown::default());
    assert_eq!(report.position, records.len() as u64);
    assert_eq!(report.requests + report.corrections, records.len() as u64);
    assert!(report.corrections > 20, "{report:?}");

    let cut = config(&dir.path().join("cut"));
    let other = streams(&records);
    for (at, crashes) in
        [(3, true), (40, false), (97, true), (101, false), (250, true), (299, false)]
    {
        let stop = Shutdown::default();
        let asked = (!crashes).then(|| stop.clone());
        let engine = Arc::new(Cut { inner: other.clone(), at, stop: asked, grows: Arc::default() });
        let ran = catch_unwind(AssertUnwindSafe(|| run(&dataset, &cut, engine, &stop)));
        assert_eq!(ran.is_err(), crashes, "at {at}");
    }
    run(&dataset, &cut, other.clone(), &Shutdown::default());

    let saved = |config: &Config, file: &str| {
        std::fs::read(work_dir(config, "1.0.0").join("saved").join(file)).unwrap()
    };
    for file in ["network", "average", "moments"] {
        let file = format!("trainer/{file}.safetensors");
        assert!(saved(&whole, &file) == saved(&cut, &file), "{file} differs");
    }
    assert!(saved(&whole, "place.json") == saved(&cut, "place.json"), "where they stand differs");
    let weights = |engine: &Arc<MemoryEngine>, name: &str| {
        let into = dir.path().join(name);
        let found = publish::bootstrap(engine.clone(), Topic::fm("1.0.0"), &into).unwrap().unwrap();
        assert_eq!(found.0.header.trained_position, records.len() as u64);
        let fm = inference::load(&into, FmServingOptions::default()).unwrap();
        let asked: Vec<Example> = records[..40]
            .iter()
            .filter_map(|record| match postcard::from_bytes(&record.payload).unwrap() {
                JoinedRecord::Example(joined) => Some(joined.example),
                JoinedRecord::Correction(_) | JoinedRecord::Content(_) => None,
            })
            .collect();
        fm.infer(&asked.iter().collect::<Vec<_>>()).unwrap()
    };
    assert!(weights(&engine, "a") == weights(&other, "b"), "what is served differs");
}

#[test]
fn it_begins_with_what_was_trained_and_has_one_owner() {
    let dir = tempfile::tempdir().unwrap();
    let (dataset, records) = world(dir.path());
    let mut config = config(&dir.path().join("work"));
    config.paths.fm = dir.path().join("fm");
    config.paths.logs = dir.path().join("logs");
    super::super::fm::train(&dataset, &config, None).unwrap();
    let engine = streams(&[]);
    run(&dataset, &config, engine.clone(), &Shutdown::default());
    let into = dir.path().join("published");
    publish::bootstrap(engine.clone(), Topic::fm("1.0.0"), &into).unwrap().unwrap();
    // It has registered itself, once; who promotes it is not asked again.
    let versions = RegistryClient::new(&*engine);
    let own = versions.read().unwrap().fm("1.0.0").unwrap().clone();
    assert_eq!((own.state, own.weights), (VersionState::Training, WeightsLocation::Published));
    assert_eq!(own.tae_dim, config.fm.tae_width());
    versions.decide(|registry| registry.promote_fm("1.0.0")).unwrap();
    run(&dataset, &config, engine.clone(), &Shutdown::default());
    assert_eq!(versions.read().unwrap().fm("1.0.0").unwrap().state, VersionState::Active);
    assert_eq!(engine.span(&Topic::versions()).unwrap().end, 2, "registered and promoted");
    let infer = |from: &Path| {
        let fm = inference::load(from, FmServingOptions::default()).unwrap();
        let JoinedRecord::Example(joined) = postcard::from_bytes(&records[9].payload).unwrap()
        else {
            panic!("record 9 is an example");
        };
        fm.infer(&[&joined.example]).unwrap()
    };
    assert!(infer(&into) == infer(&config.paths.fm), "nothing was learned since");

    let _owner = DirLock::acquire(&work_dir(&config, "1.0.0")).unwrap();
    let second = follow(
        ServiceContext { dataset: &dataset, config: &config, engine: streams(&[]) },
        &options(),
        &Shutdown::default(),
        &mut std::io::sink(),
    );
    let error = second.unwrap_err().to_string();
    assert!(error.contains(&format!("process {} works here", std::process::id())), "{error}");
}

#[test]
fn a_harmful_record_is_a_dead_letter_and_is_tried_again_once() {
    let dir = tempfile::tempdir().unwrap();
    let (mut dataset, mut records) = world(dir.path());
    // Ranges would clip them.
    Arc::make_mut(&mut dataset.schema).ranges.clear();
    let mut poisoned = Vec::new();
    for (position, record) in records.iter_mut().enumerate().skip(200) {
        let JoinedRecord::Example(mut joined) = JoinedRecord::decode(&record.payload).unwrap()
        else {
            continue;
        };
        joined.example.targets.iter_mut().for_each(|target| target.outcome.values[0] = 3e38);
        record.payload = postcard::to_stdvec(&JoinedRecord::Example(joined)).unwrap();
        poisoned.push(position as u64);
        if poisoned.len() == 3 {
            break;
        }
    }
    records[120].payload = vec![0xff; 7];
    let config = config(&dir.path().join("work"));
    let engine = streams(&records);
    // It is killed behind the first of them, with nothing saved since, and meets it again.
    let at = poisoned[0] + 12;
    let cut = Arc::new(Cut { inner: engine.clone(), at, stop: None, grows: Arc::default() });
    let killed = AssertUnwindSafe(|| run(&dataset, &config, cut, &Shutdown::default()));
    assert!(catch_unwind(killed).is_err());
    run(&dataset, &config, engine.clone(), &Shutdown::default());
    let listed = || dead_letters::list(&*engine).unwrap().letters;
    let letters = listed();
    let positions: Vec<u64> = letters.iter().map(|own| own.letter.position).collect();
    assert_eq!(positions, [[120].as_slice(), &poisoned].concat());
    assert!(letters.iter().all(|own| own.letter.reader == "fm-1_0_0"), "{letters:?}");
    assert!(letters[1].letter.reason.contains("would harm the model"), "{letters:?}");
    let place = || FmCheckpoint::read(&work_dir(&config, "1.0.0")).unwrap().unwrap();
    let before = place();
    assert_eq!(before.requests + before.corrections, records.len() as u64 - 4);

    // One that harms again, one that still cannot be read, and an honest one.
    let reader = LetterReader::Trainer(Topic::fm("1.0.0"));
    let own: Arc<dyn StreamEngine> = engine.clone();
    let of = LetterScope { reader: &reader, source: "joined" };
    let stop = Shutdown::default();
    let queue = DeadLetterQueue::open(own, of, None, Arc::default(), stop).unwrap();
    let (reason, honest) = ("by hand".to_owned(), 3);
    let by_hand =
        UnusableRecord { position: honest, retries: 0, request: None, checksum: None, reason };
    queue.set_aside(vec![by_hand]).unwrap();
    for number in [0, 1, 4] {
        dead_letters::retry(&*engine, number).unwrap();
    }
    for _ in 0..2 {
        run(&dataset, &config, engine.clone(), &Shutdown::default());
        let after = place();
        assert_eq!(after.requests, before.requests + 1, "it learns from it once");
        assert_eq!((after.position(), after.corrections), (before.position(), before.corrections));
        let again: Vec<[u64; 2]> = listed()[5..]
            .iter()
            .map(|own| [own.letter.position, u64::from(own.letter.retries)])
            .collect();
        assert_eq!(again, [[120, 1], [poisoned[0], 1]]);
    }
}
