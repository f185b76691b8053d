//! One writer and many readers; snapshots.

use hypercast_store::{Adagrad, Error, RowFormat, Store, StoreOptions, StoreReader};

use crate::model::Model;

const OPTIONS: StoreOptions = StoreOptions { dim: 4, init_scale: 0.1, seed: 5 };
const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };

#[test]
fn a_second_writer_is_refused_with_the_pid_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let first = Store::create(dir.path(), &OPTIONS).unwrap();
    let error = Store::open(dir.path()).unwrap_err();
    let pid = std::process::id().to_string();
    assert!(error.to_string().contains(&format!("process {pid}")), "{error}");
    drop(first);
    Store::open(dir.path()).unwrap();
}

#[test]
fn a_reader_sees_its_generation_while_the_writer_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    let mut model = Model::new(&OPTIONS);
    let ids: Vec<u64> = (0..1000).collect();
    let mut readers = vec![(StoreReader::open(dir.path()).unwrap(), model.clone())];
    for generation in 1..=3 {
        let grads = vec![generation as f32; ids.len() * 4];
        store.adagrad(&ids, &grads, &STEP).unwrap();
        let (reader, before) = readers.last().unwrap();
        before.check_reader(reader);
        before.check_reader(&StoreReader::open(dir.path()).unwrap());
        model.adagrad(&ids, &grads, &STEP);
        assert_eq!(store.commit().unwrap(), generation);
        assert!(!store.checkpoint().unwrap(), "readers hold the slabs as they are");
        let reader = StoreReader::open(dir.path()).unwrap();
        assert_eq!(reader.generation(), generation);
        readers.push((reader, model.clone()));
    }
    std::thread::scope(|scope| {
        for (reader, _) in &readers {
            scope.spawn(|| reader.gather(&[1, 2, 3], &mut [0.0; 12]).unwrap());
        }
    });
    for (reader, model) in &readers {
        model.check_reader(reader);
    }
    drop(readers);
    assert!(store.checkpoint().unwrap());
    model.check_store(&store);
}

#[test]
fn a_snapshot_has_the_committed_rows_and_opens_for_reading_only() {
    let dir = tempfile::tempdir().unwrap();
    let (at, to) = (dir.path().join("store"), dir.path().join("snapshot"));
    let mut store = Store::create(&at, &OPTIONS).unwrap();
    let mut model = Model::new(&OPTIONS);
    let ids: Vec<u64> = (0..500).map(|i| i * i).collect();
    for commit in [true, true, false] {
        let grads = vec![0.25; ids.len() * 4];
        store.adagrad(&ids, &grads, &STEP).unwrap();
        if commit {
            model.adagrad(&ids, &grads, &STEP);
            store.checkpoint().unwrap();
        }
    }
    store.snapshot_into(&to, RowFormat::F32).unwrap();
    let reader = StoreReader::open(&to).unwrap();
    assert_eq!((reader.generation(), reader.options()), (2, OPTIONS));
    model.check_reader(&reader);
    assert_eq!(reader.ids().collect::<Vec<_>>(), ids, "ids come in the order of insertion");
    let names = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with("state")));
    let error = Store::open(&to).unwrap_err();
    assert!(matches!(error, Error::ReadOnly { .. }), "{error}");
    let error = store.snapshot_into(&to, RowFormat::F32).unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    // A snapshot of a snapshot is the same, and the writer is free to go on.
    reader.snapshot_into(dir.path().join("again"), RowFormat::F32).unwrap();
    model.check_reader(&StoreReader::open(dir.path().join("again")).unwrap());
    assert!(store.checkpoint().unwrap());
}

#[test]
fn a_copy_goes_on_as_the_store_itself() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path().join("store"), &OPTIONS).unwrap();
    let train = |store: &mut Store, ids: std::ops::Range<u64>| {
        let ids: Vec<u64> = ids.collect();
        let grads: Vec<f32> = (0..ids.len() * 4).map(|i| (i as f32).sin()).collect();
        store.adagrad(&ids, &grads, &STEP).unwrap();
    };
    let rows = |store: &mut Store| {
        let ids: Vec<u64> = (0..300).collect();
        let mut values = vec![0.0; ids.len() * 4];
        store.gather_or_init(&ids, &mut values).unwrap();
        values
    };
    train(&mut store, 0..100);
    // A reader holds the slabs, so the copy takes the journal with it.
    let reader = StoreReader::open(dir.path().join("store")).unwrap();
    store.copy_into(dir.path().join("copy")).unwrap();
    drop(reader);
    train(&mut store, 50..200);
    let mut copy = Store::open(dir.path().join("copy")).unwrap();
    assert_eq!(copy.len(), 100);
    train(&mut copy, 50..200);
    assert_eq!(rows(&mut copy), rows(&mut store), "optimizer state was copied too");
    let error = store.copy_into(dir.path().join("copy")).unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
}
