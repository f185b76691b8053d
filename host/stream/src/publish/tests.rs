//! A follower has the same weights as the trainer; a damaged or foreign publication changes
//! nothing.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::Arc,
    time::Duration,
};

use hypercast_config::PublishSettings;
use hypercast_store::{Adagrad, StoreOptions};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::streams::tests::holes::holed;
use crate::streams::{MemoryEngine, Record, StreamEngine, Topic};

mod background;

const DIM: usize = 3;

/// A model whose weights the test changes.
struct Model {
    dense: Vec<(String, Vec<usize>, Vec<f32>)>,
    /// `None` while it is opened again.
    store: Option<Store>,
    dir: tempfile::TempDir,
}

impl Model {
    fn new() -> Model {
        let dense = |name: &str, shape: [usize; 2], value| {
            (name.to_owned(), shape.to_vec(), vec![value; shape[0] * shape[1]])
        };
        let dense = vec![dense("a", [40, 50], 1.0), dense("b", [7, 9], -2.0)];
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions { dim: DIM, init_scale: 1.0, seed: 7 };
        let mut store = Store::create(dir.path().join("rows"), &options).unwrap();
        let ids: Vec<u64> = (0..1000).map(|id| id * 77).collect();
        store.gather_or_init(&ids, &mut vec![0.0; ids.len() * DIM]).unwrap();
        store.commit().unwrap();
        Model { dense, store: Some(store), dir }
    }

    fn table(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Changes the weights as a training step does.
    fn learn(&mut self, random: &mut SmallRng) {
        for (_, _, values) in &mut self.dense {
            values.iter_mut().for_each(|value| *value += random.random_range(-0.01..0.01));
        }
        let store = self.store.as_mut().unwrap();
        let adagrad = Adagrad { learning_rate: 1.0, epsilon: 1e-8 };
        for _ in 0..random.random_range(1..200) {
            let id = random.random_range(0..1200u64) * 77;
            let gradient: [f32; DIM] = std::array::from_fn(|_| random.random_range(-9.0..9.0));
            store.adagrad(&[id], &gradient, &adagrad).unwrap();
        }
        for _ in 0..random.random_range(0..9) {
            store.remove_rows(&[random.random_range(0..1200) * 77]);
        }
        store.commit().unwrap();
    }

    /// Opens the store again, which then does not know what was removed before.
    fn forget_removals(&mut self) {
        self.store = None;
        self.store = Some(Store::open(self.dir.path().join("rows")).unwrap());
    }
}

impl WeightSource for Model {
    fn manifest(&self) -> String {
        format!("generation {}", self.table().generation())
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        let tensors = self.dense.iter();
        tensors.map(|(name, shape, values)| DenseTensor { name, shape, values }).collect()
    }

    fn rows(&self) -> Option<&Store> {
        Some(self.table())
    }
}

/// The weights that a server has.
#[derive(Debug, Default, PartialEq, Clone)]
struct Served {
    dense: BTreeMap<String, Vec<f32>>,
    rows: BTreeMap<u64, Vec<f32>>,
}

impl Served {
    fn take(&mut self, publication: &Publication) {
        if publication.header.kind == PublicationKind::Snapshot {
            *self = Served::default();
        }
        for block in &publication.blocks {
            let len = block.shape.iter().product();
            let values =
                self.dense.entry(block.name.clone()).or_insert_with(|| vec![f32::NAN; len]);
            values[block.start..block.start + block.values.len()].copy_from_slice(&block.values);
        }
        for (&id, row) in publication.ids.iter().zip(publication.rows.chunks(DIM)) {
            self.rows.insert(id, row.into());
        }
        publication.removed.iter().for_each(|id| _ = self.rows.remove(id));
    }

    fn of(model: &Model) -> Served {
        let row = |id| {
            let mut row = vec![0.0; DIM];
            model.table().gather(&[id], &mut row).unwrap();
            (id, row)
        };
        let rows = model.table().ids().map(row).collect();
        let dense = model.dense.iter().map(|(name, _, values)| (name.clone(), values.clone()));
        Served { dense: dense.collect(), rows }
    }
}

struct World {
    engine: Arc<MemoryEngine>,
    topic: Topic,
    dir: tempfile::TempDir,
    random: SmallRng,
}

impl World {
    fn new(seed: u64) -> World {
        let engine = Arc::new(MemoryEngine::default());
        let dir = tempfile::tempdir().unwrap();
        World { engine, topic: Topic::fm("1.0.0"), dir, random: SmallRng::seed_from_u64(seed) }
    }

    fn publisher(&self, settings: &PublishSettings) -> Publisher {
        let work = self.dir.path().join("work");
        Publisher::open(self.engine.clone(), self.topic.clone(), settings.clone(), &work).unwrap()
    }

    fn follower(&self) -> PublicationFollower {
        PublicationFollower::open(self.engine.clone(), self.topic.clone()).unwrap()
    }

    /// A follower of the same stream without some records.
    fn follower_without(&self, hole: Range<u64>) -> PublicationFollower {
        let engine = Arc::new(holed(&self.engine, &self.topic, &[hole]));
        PublicationFollower::open(engine, self.topic.clone()).unwrap()
    }

    fn end(&self) -> u64 {
        self.engine.span(&self.topic).unwrap().end
    }

    fn payloads(&self, from: u64) -> Vec<Vec<u8>> {
        let mut reader = self.engine.reader(&self.topic, from).unwrap();
        let mut all = Vec::new();
        while reader.position() < self.end() {
            let records = reader.next(100, Duration::ZERO).unwrap();
            all.extend(records.into_iter().map(|record| record.payload));
        }
        all
    }

    fn append(&self, payloads: &[Vec<u8>]) {
        let record = |payload: &Vec<u8>| Record { id: 0, payload: payload.clone() };
        let records: Vec<Record> = payloads.iter().map(record).collect();
        self.engine.appender(&self.topic).unwrap().append(&records).unwrap();
    }
}

fn next(follower: &mut PublicationFollower) -> Option<Publication> {
    follower.next(Duration::ZERO).unwrap()
}

const FACTS: TrainingPosition =
    TrainingPosition { trained_position: 5, trained_until_ms: 6, ingested_ms: 7 };

fn all_of_it() -> PublishSettings {
    PublishSettings { share: 1.0, ..PublishSettings::default() }
}

#[test]
fn a_follower_of_every_publication_has_the_trainers_weights() {
    let mut world = World::new(1);
    let mut model = Model::new();
    let mut publisher = world.publisher(&PublishSettings { snapshot_every: 7, ..all_of_it() });
    let (mut follower, mut served) = (world.follower(), Served::default());
    for round in 0..20 {
        let published = publisher.publish(&model, FACTS).unwrap();
        assert_eq!(published.sequence, round);
        let publication = next(&mut follower).expect("it was published");
        assert_eq!(publication.header.manifest, model.manifest());
        assert_eq!(publication.header.trained_position, 5);
        let snapshot = publication.header.kind == PublicationKind::Snapshot;
        assert_eq!(snapshot, round % 8 == 0, "round {round}");
        served.take(&publication);
        assert!(served == Served::of(&model), "round {round}");
        assert_eq!(next(&mut follower), None);
        model.learn(&mut world.random);
    }
    assert_eq!(follower.refusals, Refusals::default());
    assert!(world.engine.span(&world.topic).unwrap().start > 0, "old records are deleted");
    let mut late = world.follower();
    let mut begun = next(&mut late).unwrap();
    assert_eq!(begun.header.sequence, 16, "the newest snapshot");
    let mut patched = Served::default();
    while let Some(later) = next(&mut late) {
        begun.absorb(later).unwrap();
    }
    patched.take(&begun);
    assert!(patched == served, "absorbing deltas is equal to applying them");
    // A delta with rows of another width, which a trainer of another configuration might send.
    let header = PublicationHeader { kind: PublicationKind::Delta, ..begun.header.clone() };
    let ids = begun.ids[..1].to_vec();
    let wide =
        Publication { header, blocks: vec![], ids, rows: vec![0.5; DIM + 1], removed: vec![] };
    let error = begun.clone().absorb(wide).unwrap_err().to_string();
    assert!(error.contains("4 values") && error.contains("rows of 3"), "{error}");
}

#[test]
fn a_share_is_kept_and_nothing_starves() {
    let mut world = World::new(2);
    let mut model = Model::new();
    let settings = PublishSettings { share: 0.3, starve_after: 4, ..PublishSettings::default() };
    let mut publisher = world.publisher(&settings);
    let (mut follower, mut served) = (world.follower(), Served::default());
    let mut behind: BTreeMap<u64, u32> = BTreeMap::new();
    for round in 0..30 {
        let published = publisher.publish(&model, FACTS).unwrap();
        served.take(&next(&mut follower).unwrap());
        if round > 0 {
            let share = published.raw_bytes as f64 / published.all_bytes as f64;
            assert!(share < 0.31 && published.kind == PublicationKind::Delta, "{published:?}");
        }
        let now = Served::of(&model);
        let ids: BTreeSet<u64> = now.rows.keys().chain(served.rows.keys()).copied().collect();
        for id in ids {
            let waits = behind.entry(id).or_default();
            *waits = if now.rows.get(&id) == served.rows.get(&id) { 0 } else { *waits + 1 };
            assert!(*waits <= settings.starve_after, "round {round}: row {id} waits");
        }
        model.learn(&mut world.random);
    }
    // Without training, a few publications have all changes.
    for _ in 0..4 {
        publisher.publish(&model, FACTS).unwrap();
        served.take(&next(&mut follower).unwrap());
    }
    assert!(served == Served::of(&model));
    let idle = publisher.publish(&model, FACTS).unwrap();
    assert_eq!((idle.blocks, idle.rows, idle.removed), (0, 0, 0));
}

#[test]
fn after_a_restart_or_forgotten_removals_a_snapshot_comes_first() {
    let mut world = World::new(3);
    let mut model = Model::new();
    let mut publisher = world.publisher(&all_of_it());
    assert!(!publisher.has_snapshot());
    publisher.publish(&model, FACTS).unwrap();
    drop(publisher);
    let mut publisher = world.publisher(&all_of_it());
    assert!(publisher.has_snapshot());
    let again = publisher.publish(&model, FACTS).unwrap();
    assert_eq!((again.kind, again.sequence), (PublicationKind::Snapshot, 1));
    model.learn(&mut world.random);
    assert_eq!(publisher.publish(&model, FACTS).unwrap().kind, PublicationKind::Delta);
    model.learn(&mut world.random);
    model.forget_removals();
    assert_eq!(publisher.publish(&model, FACTS).unwrap().kind, PublicationKind::Snapshot);
    model.dense[0].1 = vec![2000];
    assert_eq!(publisher.publish(&model, FACTS).unwrap().kind, PublicationKind::Snapshot);
    let mut follower = world.follower();
    assert_eq!(next(&mut follower).unwrap().header.sequence, 4);
}

#[test]
fn two_publishers_of_one_model_do_not_mix() {
    let world = World::new(4);
    let model = Model::new();
    let (mut one, mut other) = (world.publisher(&all_of_it()), world.publisher(&all_of_it()));
    one.publish(&model, FACTS).unwrap();
    let error = other.publish(&model, FACTS).unwrap_err().to_string();
    assert!(error.contains("another process publishes"), "{error}");
    let mut follower = world.follower();
    assert_eq!(next(&mut follower).unwrap().header.sequence, 0);
    assert_eq!(next(&mut follower), None);
}

/// A stream with a snapshot and a delta, and the delta's records.
fn with_delta(seed: u64) -> (World, Model, Publisher, Vec<Vec<u8>>) {
    let mut world = World::new(seed);
    let mut model = Model::new();
    let mut publisher = world.publisher(&PublishSettings { snapshot_every: 1, ..all_of_it() });
    publisher.publish(&model, FACTS).unwrap();
    let at = world.end();
    model.learn(&mut world.random);
    publisher.publish(&model, FACTS).unwrap();
    let delta = world.payloads(at);
    assert!(delta.len() >= 3, "a beginning, parts and an end");
    (world, model, publisher, delta)
}

#[test]
fn a_damaged_torn_or_foreign_delta_changes_nothing_until_the_next_snapshot() {
    let (source, mut model, mut publisher, delta) = with_delta(5);
    let records = source.payloads(0);
    let snapshot = &records[..records.len() - delta.len()];
    let end = source.end();
    model.learn(&mut SmallRng::seed_from_u64(9));
    let published = publisher.publish(&model, FACTS).unwrap();
    assert_eq!(published.kind, PublicationKind::Snapshot);
    let mut damaged = delta.clone();
    damaged[1][40] ^= 1;
    let torn = delta[..delta.len() - 1].to_vec();
    let gap = [&delta[..1], &delta[2..]].concat();
    let (_, _, _, foreign) = with_delta(6);
    let mixed = [&delta[..1], &foreign[1..]].concat();
    let cases = [
        ("damaged", damaged),
        ("torn", torn),
        ("gap", gap),
        ("foreign", foreign),
        ("mixed", mixed),
        ("tail", delta[1..].to_vec()),
    ];
    for (what, bad) in cases {
        let world = World::new(0);
        world.append(snapshot);
        let mut follower = world.follower();
        let first = next(&mut follower).unwrap();
        let at = follower.at;
        world.append(&bad);
        assert_eq!(next(&mut follower).map(|publication| publication.header.kind), None, "{what}");
        assert_eq!(follower.at, at, "{what}");
        world.publisher(&all_of_it()).publish(&model, FACTS).unwrap();
        let next = next(&mut follower).expect("the next snapshot is accepted");
        assert_eq!(next.header.kind, PublicationKind::Snapshot, "{what}");
        let refusals = follower.refusals;
        let count = refusals.damaged + refusals.foreign + refusals.torn + refusals.out_of_chain;
        assert!(count > 0, "{what}: {refusals:?}");
        let mut served = Served::default();
        served.take(&first);
        served.take(&next);
        assert!(served == Served::of(&model), "{what}");
    }
    assert!(source.payloads(end).len() > 2);
}

#[test]
fn a_follower_whose_records_were_deleted_continues_at_the_newest_snapshot() {
    let (world, mut model, mut publisher, _) = with_delta(7);
    let mut follower = world.follower();
    next(&mut follower).unwrap();
    let end = world.end();
    for _ in 0..8 {
        model.learn(&mut SmallRng::seed_from_u64(3));
        publisher.publish(&model, FACTS).unwrap();
    }
    assert!(world.engine.span(&world.topic).unwrap().start > end);
    let newest = next(&mut world.follower()).unwrap();
    assert_eq!(newest.header.kind, PublicationKind::Snapshot);
    assert_eq!(next(&mut follower).unwrap().header.sequence, 1, "it had read this one before");
    assert_eq!(next(&mut follower).unwrap().header.sequence, newest.header.sequence);
}

#[test]
fn a_damaged_end_of_the_stream_does_not_hide_its_snapshot() {
    let (world, model, _, delta) = with_delta(8);
    let mut last = delta[delta.len() - 1].clone();
    last[9] ^= 1;
    world.append(&[last]);
    let mut follower = world.follower();
    assert_eq!(next(&mut follower).unwrap().header.sequence, 0);
    assert_eq!(next(&mut follower).unwrap().header.sequence, 1);
    assert_eq!(next(&mut follower), None);
    assert_eq!(follower.refusals.damaged, 1);
    let mut publisher = world.publisher(&all_of_it());
    let published = publisher.publish(&model, FACTS).unwrap();
    assert!(published.sequence > 1, "no number is used twice");
    assert_eq!(next(&mut follower).unwrap().header.sequence, published.sequence);
}

/// The numbers of the publications that a follower gives, to the end of the stream.
fn sequences(follower: &mut PublicationFollower) -> Vec<u64> {
    std::iter::from_fn(|| next(follower)).map(|publication| publication.header.sequence).collect()
}

#[test]
fn a_follower_goes_on_behind_a_hole_and_takes_no_snapshot_twice() {
    let mut world = World::new(9);
    let mut model = Model::new();
    let mut publisher = world.publisher(&PublishSettings { snapshot_every: 4, ..all_of_it() });
    // Snapshots 0, 5 and 10, with deltas between them; 0 is deleted by then.
    let mut begins = Vec::new();
    let mut publish = |world: &mut World, publications: usize| {
        for _ in 0..publications {
            begins.push(world.end());
            publisher.publish(&model, FACTS).unwrap();
            model.learn(&mut world.random);
        }
        begins.clone()
    };
    let begins = publish(&mut world, 8);
    // A hole in delta 6: nothing continues it until snapshot 10 comes.
    let mut follower = world.follower_without(begins[6] + 1..begins[6] + 2);
    assert_eq!(sequences(&mut follower), [5]);
    assert_eq!((follower.refusals.torn, follower.refusals.out_of_chain), (1, 1));
    let mut late = world.follower_without(begins[7] + 1..begins[7] + 2);
    assert_eq!(next(&mut late).unwrap().header.sequence, 5);
    let begins = publish(&mut world, 4);
    assert_eq!(sequences(&mut follower), [10, 11]);
    // Deltas between a hole and a newer snapshot are not even tried.
    assert_eq!(sequences(&mut late), [6, 10, 11]);
    assert_eq!(late.refusals, Refusals { torn: 1, ..Refusals::default() });
    // One in the newest snapshot: the one before it serves.
    for lost in [begins[10], begins[10] + 1, begins[11] - 1] {
        let mut follower = world.follower_without(lost..lost + 1);
        assert_eq!(sequences(&mut follower), [5, 6, 7, 8, 9], "without {lost}");
    }
    let mut follower = world.follower_without(world.end() - 1..world.end());
    assert_eq!(sequences(&mut follower), [10], "the last record is missing");
    assert_eq!(sequences(&mut follower), [0; 0]);
}

#[test]
fn a_trainer_goes_on_publishing_to_a_stream_with_a_hole() {
    let (world, model, publisher, delta) = with_delta(10);
    drop(publisher);
    let end = world.end();
    for hole in [end - 1..end, end - delta.len() as u64..end] {
        let engine = Arc::new(holed(&world.engine, &world.topic, &[hole]));
        let tail = publisher::PublishedTail::of(&*engine, &world.topic).unwrap();
        assert_eq!((tail.end, tail.snapshot), (end, Some(0)));
        assert!(tail.sequence > 1, "no number is used twice");
    }
    let hole = end - 1..end;
    let engine = Arc::new(holed(&world.engine, &world.topic, std::slice::from_ref(&hole)));
    let work = world.dir.path().join("work");
    let mut publisher = Publisher::open(engine, world.topic.clone(), all_of_it(), &work).unwrap();
    publisher.publish(&model, FACTS).unwrap();
    let published = next(&mut world.follower_without(hole)).unwrap();
    assert_eq!(published.header.kind, PublicationKind::Snapshot);
    assert!(published.header.sequence > 1);
}
