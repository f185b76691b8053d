//! Which ids have rows: admission, expiry, rows that are used again, and what has changed since a
//! generation.

use hypercast_store::{Adagrad, Store, StoreOptions, StoreReader};

use crate::model::Model;

const OPTIONS: StoreOptions = StoreOptions { dim: 4, init_scale: 0.1, seed: 3 };
const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };

fn train(store: &mut Store, ids: &[u64]) {
    store.adagrad(ids, &vec![0.5; ids.len() * 4], &STEP).unwrap();
}

#[test]
fn an_id_gets_a_row_when_it_was_seen_often_enough_also_across_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    store.admit_after(3);
    let ids: Vec<u64> = (0..500).collect();
    let mut out = vec![f32::NAN; 2000];
    for seen in 1..=3 {
        let new = store.gather_or_init(&ids, &mut out).unwrap();
        train(&mut store, &ids);
        assert_eq!(new, if seen < 3 { 0 } else { 500 });
        assert_eq!(out.iter().all(|v| *v == 0.0), seen < 3);
        assert_eq!(store.len(), new);
        match seen {
            // Counters from the journal, and from a checkpoint.
            1 => drop(store.commit().unwrap()),
            _ => assert!(store.checkpoint().unwrap()),
        }
        // What is not committed is forgotten.
        store.gather_or_init(&[900, 901], &mut out[..8]).unwrap();
        drop(store);
        store = Store::open(dir.path()).unwrap();
        store.admit_after(3);
    }
    assert_eq!(store.gather_or_init(&[900], &mut out[..4]).unwrap(), 0);
    assert_eq!(store.gather_or_init(&[900], &mut out[..4]).unwrap(), 0);
    assert_eq!(store.gather_or_init(&[900], &mut out[..4]).unwrap(), 1);
}

#[test]
fn rows_expire_and_their_numbers_are_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    let mut model = Model::new(&OPTIONS);
    let learn = |store: &mut Store, model: &mut Model, ids: &[u64], clock: u32| {
        store.set_clock(clock);
        train(store, ids);
        model.adagrad(ids, &vec![0.5; ids.len() * 4], &STEP);
    };
    let old: Vec<u64> = (0..1000).collect();
    let kept: Vec<u64> = (0..1000).step_by(4).collect();
    learn(&mut store, &mut model, &old, 1);
    store.checkpoint().unwrap();
    learn(&mut store, &mut model, &kept, 5);
    assert_eq!(store.expire(5), 750);
    model.rows.retain(|id, _| id % 4 == 0);
    model.check_store(&store);
    let before = StoreReader::open(dir.path()).unwrap();
    assert_eq!(before.len(), 1000, "the removal is not committed");
    drop(before);
    // An expired id may come back at once, as a new one, and its old row stays out of use until the
    // next checkpoint.
    learn(&mut store, &mut model, &[1], 6);
    model.check_store(&store);
    store.commit().unwrap();
    model.check_reader(&StoreReader::open(dir.path()).unwrap());
    drop(store);
    store = Store::open(dir.path()).unwrap();
    model.check_store(&store);
    assert!(store.checkpoint().unwrap());
    let young: Vec<u64> = (5000..5700).collect();
    for reopened in [false, true] {
        if reopened {
            drop(store);
            store = Store::open(dir.path()).unwrap();
        }
        learn(&mut store, &mut model, &young, 7);
        store.commit().unwrap();
        model.check_store(&store);
        model.check_reader(&StoreReader::open(dir.path()).unwrap());
    }
    assert!(store.checkpoint().unwrap());
    drop(store);
    store = Store::open(dir.path()).unwrap();
    model.check_store(&store);
    let mut print = |damage| panic!("{damage}");
    let checked = hypercast_store::check(dir.path(), &mut print).unwrap();
    assert_eq!(checked.rows, 1001, "700 young ids found room among 750 expired ones");
    // The index is derived, free rows included.
    drop(store);
    std::fs::remove_file(dir.path().join("index.table")).unwrap();
    store = Store::open(dir.path()).unwrap();
    model.check_store(&store);
    model.check_state(&mut store);
}

#[test]
fn what_changed_since_a_generation_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    let changed = |store: &Store, since| store.changed_since(since).collect::<Vec<u64>>();
    train(&mut store, &[1, 2, 3, 4]);
    assert_eq!(changed(&store, 0), [] as [u64; 0], "nothing is committed");
    store.commit().unwrap();
    train(&mut store, &[2, 9]);
    store.checkpoint().unwrap();
    train(&mut store, &[3]);
    store.commit().unwrap();
    for _ in 0..2 {
        assert_eq!(changed(&store, 0), [1, 2, 3, 4, 9]);
        assert_eq!(changed(&store, 1), [2, 3, 9]);
        assert_eq!(changed(&store, 2), [3]);
        assert_eq!(changed(&store, 3), [] as [u64; 0]);
        store.checkpoint().unwrap();
        drop(store);
        store = Store::open(dir.path()).unwrap();
    }
}
