//! Handles beside the writer: whole rows, committed ones only, whatever commits, checkpoints,
//! growth and removals go on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hypercast_store::{
    Adagrad, Error, RowFormat, ServingStore, Store, StoreOptions, StoreReader, Verify,
};

use crate::model::Model;

const DIM: usize = 24;
const OPTIONS: StoreOptions = StoreOptions { dim: DIM, init_scale: 0.1, seed: 9 };
const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };

fn train(store: &mut Store, ids: &[u64]) {
    store.adagrad(ids, &vec![0.5; ids.len() * DIM], &STEP).unwrap();
}

#[test]
fn a_handle_sees_what_is_committed_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    let mut model = Model::new(&OPTIONS);
    train(&mut store, &[1, 2]);
    let handle = store.handle().unwrap();
    assert_eq!((handle.len(), handle.generation()), (0, 0), "nothing is committed yet");
    assert_eq!(handle.gather(&[1], &mut [0.0; DIM]).unwrap(), 1);
    let mut all: Vec<u64> = vec![1, 2];
    model.adagrad(&all, &[0.5; DIM * 2], &STEP);
    for round in 0..6u64 {
        store.commit().unwrap();
        let check = |model: &Model| {
            model.check(all.iter().copied(), DIM, |ids, out| handle.gather(ids, out).unwrap())
        };
        check(&model);
        // Uncommitted updates and new ids do not show.
        let young: Vec<u64> =
            (round * 20_000..round * 20_000 + 20_000).map(|i| i * 3 + 10).collect();
        train(&mut store, &young);
        train(&mut store, &all);
        check(&model);
        model.adagrad(&young, &vec![0.5; young.len() * DIM], &STEP);
        model.adagrad(&all, &vec![0.5; all.len() * DIM], &STEP);
        all.extend(young);
        if round % 2 == 1 {
            assert!(store.checkpoint().unwrap(), "a handle does not hold up a checkpoint");
        }
    }
    store.commit().unwrap();
    assert_eq!((handle.len(), handle.generation()), (all.len(), store.generation()));
    assert!(handle.contains(1) && !handle.contains(0));
    let late = store.handle().unwrap();
    model.check(all.iter().copied(), DIM, |ids, out| late.gather(ids, out).unwrap());
    drop(store);
    model.check(all.iter().copied(), DIM, |ids, out| handle.gather(ids, out).unwrap());
    // Another writer may come, but changes no slab under a handle that is left.
    let mut again = Store::open(dir.path()).unwrap();
    train(&mut again, &all);
    assert!(!again.checkpoint().unwrap());
    model.check(all.iter().copied(), DIM, |ids, out| handle.gather(ids, out).unwrap());
    drop((handle, late));
    assert!(again.checkpoint().unwrap());
}

/// Values by which a torn row, or another's, is seen: all the same, and telling id and version.
fn row(id: u64, version: u64) -> f32 {
    (id * 256 + version % 256) as f32
}

#[test]
fn rows_are_whole_and_their_own_while_the_writer_goes_on() {
    const IDS: u64 = 3000;
    let dir = tempfile::tempdir().unwrap();
    let (at, to) = (dir.path().join("t"), dir.path().join("s"));
    let mut training = Store::create(&at, &OPTIONS).unwrap();
    train(&mut training, &[0]);
    training.commit().unwrap();
    training.snapshot_into(&to, RowFormat::F32).unwrap();
    let mut store = ServingStore::open(&to, Verify::Full).unwrap();
    let upsert = |store: &mut ServingStore, ids: &[u64], version: u64| {
        let values: Vec<f32> = ids.iter().flat_map(|&id| [row(id, version); DIM]).collect();
        store.upsert_rows(ids, &values).unwrap();
    };
    let first: Vec<u64> = (0..IDS).collect();
    upsert(&mut store, &first, 0);
    store.commit().unwrap();
    let handle = store.handle().unwrap();
    let (stop, reads) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for reader in 0..3u64 {
            let (handle, stop, reads) = (handle.clone(), &stop, &reads);
            scope.spawn(move || {
                // Ids below IDS are there all the time; those above come and go.
                let ids: Vec<u64> = (0..700).map(|i| (i * (7 + reader)) % (2 * IDS)).collect();
                let mut out = vec![0.0; ids.len() * DIM];
                while !stop.load(Ordering::Relaxed) {
                    handle.gather(&ids, &mut out).unwrap();
                    for (&id, values) in ids.iter().zip(out.chunks(DIM)) {
                        assert!(
                            values.iter().all(|v| *v == values[0]),
                            "id {id} is torn: {values:?}"
                        );
                        let of = values[0] as u64 / 256;
                        let is_missing = values[0] == 0.0 && id >= IDS;
                        assert!(of == id || is_missing, "id {id} has the row of {of}");
                    }
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut version = 1;
        while version < 120 || reads.load(Ordering::Relaxed) < 200 {
            let part: Vec<u64> = (0..IDS).filter(|id| (id + version) % 3 == 0).collect();
            upsert(&mut store, &part, version);
            let comers: Vec<u64> = (IDS..2 * IDS).filter(|id| (id + version) % 5 == 0).collect();
            match version % 2 {
                0 => upsert(&mut store, &comers, version),
                _ => assert!(store.remove_rows(&comers) <= comers.len()),
            }
            store.commit().unwrap();
            if version.is_multiple_of(7) {
                assert!(store.checkpoint().unwrap());
            }
            version += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    let len = store.len();
    drop((store, handle));
    let reader = StoreReader::open(&to).unwrap();
    assert_eq!(reader.len(), len);
    let again: std::collections::HashSet<u64> = reader.ids().collect();
    assert_eq!(again.len(), len, "no id has two rows");
    let mut print = |damage| panic!("{damage}");
    assert_eq!(hypercast_store::check(&to, &mut print).unwrap().damages, 0);
}

#[test]
fn quantised_snapshots_give_rounded_rows_and_take_upserts() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path().join("t"), &OPTIONS).unwrap();
    let ids: Vec<u64> = (0..3000).map(|i| i * 5).collect();
    let mut exact = vec![0.0; ids.len() * DIM];
    store.gather_or_init(&ids, &mut exact).unwrap();
    store.commit().unwrap();
    for (format, most, bytes) in [
        (RowFormat::F32, 0.0, DIM * 4),
        (RowFormat::Bf16, 0.1 / 256.0, DIM * 2),
        (RowFormat::Int8, 0.1 / 253.0, DIM + 4),
    ] {
        assert_eq!(format.row_bytes(DIM), bytes);
        let to = dir.path().join(format!("{format:?}"));
        store.snapshot_into(&to, format).unwrap();
        let reader = StoreReader::open(&to).unwrap();
        assert_eq!(reader.format(), format);
        let mut out = vec![0.0; exact.len()];
        assert_eq!(reader.gather(&ids, &mut out).unwrap(), 0);
        assert!(exact.iter().zip(&out).all(|(a, b)| (a - b).abs() <= most), "{format:?}");
        drop(reader);
        let mut serving = ServingStore::open(&to, Verify::Full).unwrap();
        let handle = serving.handle().unwrap();
        let sent: Vec<f32> = (0..DIM).map(|i| (i as f32 * 0.7).sin()).collect();
        serving.upsert_rows(&[10, 7], &[&sent[..], &sent[..]].concat()).unwrap();
        serving.commit().unwrap();
        let mut before = vec![0.0; DIM * 3];
        assert_eq!(handle.gather(&[7, 10, 8], &mut before).unwrap(), 1);
        assert!(serving.checkpoint().unwrap());
        let mut after = vec![0.0; DIM * 3];
        handle.gather(&[7, 10, 8], &mut after).unwrap();
        assert_eq!(before, after, "{format:?}: a checkpoint changes no row");
        let error = serving.upsert_rows(&[1], &[f32::NAN; DIM]).unwrap_err();
        assert!(matches!(error, Error::NotFiniteValue { id: 1 }), "{error}");
    }
    let error = ServingStore::open(dir.path().join("t"), Verify::Full).unwrap_err();
    assert!(matches!(error, Error::NotServing { .. }), "{error}");
}

#[test]
fn a_reader_of_another_process_sees_commits_and_checkpoints() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
    let mut model = Model::new(&OPTIONS);
    for round in 0..8u64 {
        let ids: Vec<u64> = (round * 50..round * 50 + 100).collect();
        model.adagrad(&ids, &vec![0.5; ids.len() * DIM], &STEP);
        train(&mut store, &ids);
        let gone: Vec<u64> = (round * 50..round * 50 + 5).collect();
        store.remove_rows(&gone);
        gone.iter().for_each(|id| drop(model.rows.remove(id)));
        store.commit().unwrap();
        let reader = StoreReader::open(dir.path()).unwrap();
        assert_eq!(reader.generation(), store.generation());
        model.check_reader(&reader);
        assert!(!store.checkpoint().unwrap(), "a reader has it open");
        drop(reader);
        if round == 4 {
            assert!(store.checkpoint().unwrap());
        }
    }
}
