//! Random sequences of operations against the model.

use hypercast_store::{Adagrad, RowFormat, Store, StoreOptions, StoreReader};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::model::{Model, exact_grads};

#[test]
fn random_operations_match_the_model() {
    for seed in 0..12 {
        let mut rng = StdRng::seed_from_u64(seed);
        let options =
            StoreOptions { dim: [1, 2, 5, 8, 11, 32][seed as usize % 6], init_scale: 0.1, seed };
        run(&mut rng, &options, 80);
    }
}

fn run(rng: &mut StdRng, options: &StoreOptions, steps: usize) {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path().join("s"), options).unwrap();
    let mut model = Model::new(options);
    let mut committed = model.clone();
    let mut readers: Vec<(StoreReader, Model)> = Vec::new();
    let mut snapshots = 0;
    for _ in 0..steps {
        let ids = random_ids(rng);
        match rng.random_range(0..20) {
            0..5 => {
                let mut out = vec![f32::NAN; ids.len() * options.dim];
                let before = model.rows.len();
                model.init(&ids);
                let new = store.gather_or_init(&ids, &mut out).unwrap();
                assert_eq!(new, model.rows.len() - before);
                for (id, values) in ids.iter().zip(out.chunks(options.dim)) {
                    assert_eq!(values, model.rows[id].0);
                }
            }
            5..12 => {
                let step = Adagrad { learning_rate: 0.05, epsilon: 1e-7 };
                let grads = exact_grads(rng, ids.len() * options.dim);
                model.adagrad(&ids, &grads, &step);
                store.adagrad(&ids, &grads, &step).unwrap();
            }
            12..14 => {
                let before = store.generation();
                let generation = store.commit().unwrap();
                assert!(generation == before || generation == before + 1);
                committed = model.clone();
            }
            14..16 => {
                let folded = store.checkpoint().unwrap();
                assert_eq!(folded, readers.is_empty());
                committed = model.clone();
            }
            16 => {
                drop(store);
                store = Store::open(dir.path().join("s")).unwrap();
                model = committed.clone();
            }
            17 if readers.len() < 3 => {
                let reader = StoreReader::open(dir.path().join("s")).unwrap();
                readers.push((reader, committed.clone()));
            }
            18 => {
                let to = dir.path().join(format!("snapshot-{snapshots}"));
                snapshots += 1;
                store.snapshot_into(&to, RowFormat::F32).unwrap();
                let reader = StoreReader::open(&to).unwrap();
                assert_eq!(reader.generation(), store.generation());
                committed.check_reader(&reader);
            }
            _ => readers.clear(),
        }
        model.check_store(&store);
        for (reader, model) in &readers {
            model.check_reader(reader);
        }
    }
    model.check_state(&mut store);
}

/// Unique ids, some dense, some over the whole range.
fn random_ids(rng: &mut StdRng) -> Vec<u64> {
    let n = rng.random_range(1..200);
    let mut ids: Vec<u64> = (0..n)
        .map(|_| match rng.random_range(0..10) {
            0 => rng.random(),
            1 => u64::MAX - rng.random_range(0..50),
            2 => rng.random_range(0..50) << 32,
            _ => rng.random_range(0..2000),
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[test]
fn initial_values_depend_on_seed_and_id_alone() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, seed: u64, ids: &[u64]| {
        let options = StoreOptions { dim: 16, init_scale: 0.02, seed };
        let mut store = Store::create(dir.path().join(name), &options).unwrap();
        let mut out = vec![0.0; 16];
        for id in ids {
            store.gather_or_init(&[*id], &mut out).unwrap();
        }
        let mut out = vec![0.0; 48];
        assert_eq!(store.gather(&[5, 6, u64::MAX], &mut out).unwrap(), 0);
        out
    };
    let a = make("a", 1, &[5, 6, u64::MAX]);
    assert_eq!(a, make("b", 1, &[u64::MAX, 9, 0, 6, 5]));
    let c = make("c", 2, &[5, 6, u64::MAX]);
    assert!(a.iter().zip(&c).all(|(a, c)| a != c), "another seed gives other values");
    assert_ne!(a[..16], a[16..32], "another id gives other values");
    assert!(a.iter().all(|v| v.abs() <= 0.02));
}

#[test]
fn a_store_over_several_slabs_reopens() {
    let dir = tempfile::tempdir().unwrap();
    let options = StoreOptions { dim: 2, init_scale: 1.0, seed: 3 };
    let mut model = Model::new(&options);
    let mut store = Store::create(dir.path(), &options).unwrap();
    let mut rng = StdRng::seed_from_u64(0);
    let step = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };
    for part in 0..4u64 {
        let ids: Vec<u64> = (0..50_000).map(|i| (part * 40_000 + i) * 31).collect();
        let grads = exact_grads(&mut rng, ids.len() * 2);
        model.adagrad(&ids, &grads, &step);
        store.adagrad(&ids, &grads, &step).unwrap();
        assert_eq!(store.commit().unwrap(), part + 1);
        if part != 2 {
            assert!(store.checkpoint().unwrap());
        }
        drop(store);
        store = Store::open(dir.path()).unwrap();
        model.check_store(&store);
    }
    assert!(dir.path().join("rows-00002.slab").exists());
    model.check_state(&mut store);
}
