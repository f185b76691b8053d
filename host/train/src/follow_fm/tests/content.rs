//! A trainer learns what content vectors say, also of items whose vectors come by events.

use std::sync::atomic::{AtomicUsize, Ordering};

use hypercast_core::hash::mix64;
use hypercast_data::dataset::content::Content;
use hypercast_data::dataset::{Entities, Impression, write_dataset};
use hypercast_data::features::{FeatureConfig, FeatureState, replay::request_input};
use hypercast_fm::example::{Item, Outcome};
use hypercast_stream::events::{EventKind, EventRecord};
use hypercast_stream::join::{Joiner, JoinerOptions, JoinerOutput, StateUpdate};

use super::*;

const SCHEMA: &str = r#"
    surfaces = ["feed"]
    actions = ["click"]
    tasks = [{ name = "click", role = "main", kind = "binary", label = "click" }]"#;

/// Requests that are learned from, each with items that no other has.
const REQUESTS: u64 = 2500;

/// Items of a request.
const TARGETS: u64 = 6;

/// The share of clicks on items of either kind, of which their vectors tell.
const SHARES: [f64; 2] = [0.9, 0.1];

fn kind_of(item: u64) -> usize {
    mix64(item) as usize % 2
}

/// A vector of the item's kind, and some noise.
fn vector(item: u64) -> Arc<[f32]> {
    let noise = |at: u64| (mix64(item ^ at << 32) % 1000) as f32 / 5000.0 - 0.1;
    let mut vector = [1, 2, 3, 4].map(noise);
    vector[kind_of(item)] += 0.95;
    vector.into()
}

fn row(request: u64, item: u64) -> Impression {
    let chance = (mix64(request * 1000 + item) % 1000) as f64 / 1000.0;
    let actions = u64::from(chance < SHARES[kind_of(item)]);
    let time_ms = request as i64 * 1000;
    Impression {
        request,
        time_ms,
        outcome_ms: time_ms,
        user: request % 20 + 1,
        item,
        surface: 0,
        outcome: Outcome { actions, known: 1, ..Outcome::UNKNOWN },
        context: Default::default(),
        truth: Vec::new(),
        history_only: false,
    }
}

/// The items of a request, by ids that no other request has.
fn rows(request: u64) -> Vec<Impression> {
    (1..=TARGETS).map(|at| row(request, request * 100 + at)).collect()
}

/// The joiner, what it has written, and the features of a daemon that follows its outcomes.
struct ContentWorld {
    dataset: Dataset,
    joiner: Joiner,
    state: FeatureState,
    joined: Vec<Record>,
}

impl ContentWorld {
    fn new(dir: &Path) -> ContentWorld {
        let schema: Schema = toml::from_str(SCHEMA).unwrap();
        let items = [Item { id: 1, ..Item::default() }];
        let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &[] };
        write_dataset(dir, &entities, &mut []).unwrap();
        Content { width: 4, items: vec![1], vectors: vec![0.5; 4] }.write(dir).unwrap();
        let dataset = Dataset::open(dir).unwrap();
        let features = FeatureConfig::default();
        let settings = Config::default().join;
        let options = JoinerOptions { settings, history_len: 8, max_targets: 32 };
        let state = FeatureState::new(&Joiner::bare(&dataset), features);
        let joiner = Joiner::new(state, options).with_content(dataset.content);
        let state = FeatureState::new(&dataset, features);
        ContentWorld { dataset, joiner, state, joined: Vec::new() }
    }

    fn take(&mut self, kind: EventKind) {
        let mut made = JoinerOutput::default();
        self.joiner.take(EventRecord { ingested_ms: 1 << 52, kind }, &mut made);
        self.joined.extend(made.joined.iter().map(|joined| {
            let payload = postcard::to_stdvec(joined).unwrap();
            Record { id: 0, payload }
        }));
        for outcome in made.outcomes {
            match outcome.update {
                StateUpdate::Outcome(row) => self.state.apply(&row),
                StateUpdate::Item(item) => self.state.upsert_item(item).unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    fn tell(&mut self, item: u64) {
        self.take(EventKind::Item(Item { id: item, content: vector(item), ..Item::default() }));
    }

    /// The last of the records that a reader of joined examples finds from a position on.
    fn last_read(&self, engine: Arc<dyn StreamEngine>, from: u64, config: &Config) -> Example {
        let telemetry = JobMetrics::default();
        let reports = RecordReports::of(&telemetry, config, &Shutdown::default());
        let context = ServiceContext { dataset: &self.dataset, config, engine };
        let joined = Some(StreamPlace::at(from).into());
        let position = JoinedPosition { joined, orders: None };
        let mut reader =
            JoinedReader::open(context, &LetterReader::Logging, position, reports).unwrap();
        match reader.next(1024, Duration::ZERO).unwrap() {
            JoinedRead::Records(mut records) => records.pop().unwrap().example,
            _ => panic!("there are records"),
        }
    }
}

/// Streams that count how often one is opened for reading.
struct Counted {
    inner: Arc<MemoryEngine>,
    opened: AtomicUsize,
}

impl StreamEngine for Counted {
    fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
        self.inner.appender(topic)
    }

    fn resume(
        &self,
        topic: &Topic,
        place: StreamPlace,
    ) -> hypercast_stream::Result<Box<dyn Reader>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.inner.resume(topic, place)
    }

    fn span(&self, topic: &Topic) -> hypercast_stream::Result<Range<u64>> {
        self.inner.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
        self.inner.trim(topic, before)
    }
}

/// The mean cross-entropy of what a model predicts of fresh items' first requests.
fn loss(fm: &dyn inference::FoundationModel, state: &FeatureState, requests: Range<u64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0.0);
    for request in requests {
        let rows = rows(request);
        let example = state.fetch(&request_input(&rows), 8);
        let said = fm.infer(&[&example]).unwrap().main;
        for (row, &said) in rows.iter().zip(&said) {
            let (said, share) = (f64::from(said), SHARES[kind_of(row.item)]);
            sum -= share * said.ln() + (1.0 - share) * (1.0 - said).ln();
            count += 1.0;
        }
    }
    sum / count
}

#[test]
fn a_fresh_item_is_predicted_by_the_vector_that_came_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = ContentWorld::new(&dir.path().join("data"));
    for request in 1..=REQUESTS {
        // Some come without, so that the model meets such, too.
        let told = rows(request).into_iter().filter(|row| !mix64(row.item).is_multiple_of(5));
        told.for_each(|row| world.tell(row.item));
        world.take(EventKind::CompleteRequest(rows(request)));
    }
    let engine = streams(&world.joined);
    let mut config = config(&dir.path().join("work"));
    // No item has a row of its own by which it could be learned.
    let rates = FmConfig { learning_rate: 5e-3, average_decay: 0.9, warmup_steps: 20, ..config.fm };
    config.fm = FmConfig { admit_after: 50, dropout: 0.0, ..rates };
    config.fm_gate.rows = 0;
    let report = run(&world.dataset, &config, engine.clone(), &Shutdown::default());
    assert_eq!((report.requests, report.position), (REQUESTS, world.joined.len() as u64));
    let into = dir.path().join("published");
    publish::bootstrap(engine, Topic::fm("1.0.0"), &into).unwrap().unwrap();
    let fm = inference::load(&into, FmServingOptions::default()).unwrap();
    let fresh = REQUESTS + 1..REQUESTS + 41;
    let without = loss(&*fm, &world.state, fresh.clone());
    fresh.clone().flat_map(rows).for_each(|row| world.tell(row.item));
    let with = loss(&*fm, &world.state, fresh.clone());
    println!("figure: cross-entropy {with:.3} with vectors, {without:.3} without");
    // 0.325 is the least that is possible, and 0.693 that of the base rate.
    assert!(with < 0.45 && without > 0.6, "{with} with vectors, {without} without");
}

/// Trainers that begin at the end of a stream find the vectors of before.
#[test]
fn vectors_of_before_a_reader_began_are_read_where_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = ContentWorld::new(&dir.path().join("data"));
    for request in 1..=3 {
        rows(1).iter().for_each(|row| world.tell(row.item));
        let time_ms = request as i64 * 1000;
        let again = |row| Impression { request, time_ms, outcome_ms: time_ms, ..row };
        let of_first = rows(1).into_iter().map(again);
        world.take(EventKind::CompleteRequest(of_first.collect()));
    }
    let engine = streams(&world.joined);
    let (last, config) = (world.joined.len() as u64 - 1, Config::default());
    let mut small = config.clone();
    small.features.max_content_mib = 0;
    let vectors = |example: &Example| -> Vec<Vec<f32>> {
        let targets = example.targets.iter().map(|target| target.item.content.to_vec());
        targets.chain(example.history.iter().map(|event| event.item.content.to_vec())).collect()
    };
    let expected: Vec<Vec<f32>> = rows(1).iter().map(|row| vector(row.item).to_vec()).collect();
    for (from, config) in [(0, &config), (last, &config), (last, &small), (0, &small)] {
        let found = vectors(&world.last_read(engine.clone(), from, config));
        assert_eq!(found[..TARGETS as usize], expected, "from {from}");
        assert!(found[TARGETS as usize..].iter().all(|own| expected.contains(own)), "from {from}");
    }
    // What is gone is missing, and stops nobody.
    engine.trim(&Topic::joined(), last).unwrap();
    let found = vectors(&world.last_read(engine, last, &config));
    assert!(found.iter().all(Vec::is_empty), "{found:?}");
}

/// To find a record an engine may read a whole segment.
#[test]
fn the_vectors_of_before_a_reader_began_are_not_read_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut world = ContentWorld::new(&dir.path().join("data"));
    (1..=30).flat_map(rows).for_each(|row| world.tell(row.item));
    let from = world.joined.len() as u64;
    (1..=30).for_each(|request| world.take(EventKind::CompleteRequest(rows(request))));
    assert_eq!(world.joined.len() as u64, from + 30, "no vector is repeated");
    let engine = Arc::new(Counted { inner: streams(&world.joined), opened: AtomicUsize::new(0) });
    let last = world.last_read(engine.clone(), from, &Config::default());
    let found: Vec<&[f32]> = last.targets.iter().map(|target| &target.item.content[..]).collect();
    let expected: Vec<Arc<[f32]>> = rows(30).iter().map(|row| vector(row.item)).collect();
    assert_eq!(found, expected.iter().map(|own| &own[..]).collect::<Vec<_>>());
    let opened = engine.opened.load(Ordering::Relaxed);
    assert!(opened <= 8, "opened {opened} times for {from} vectors");
}
