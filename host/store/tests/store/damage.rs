//! Flipped bits, cut-off and foreign files: each open fails with an error that
//! names the file and says what to do.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use hypercast_store::{
    Adagrad, Error, RowFormat, ServingStore, Store, StoreOptions, StoreReader, Verify,
};

use crate::model::Model;

const OPTIONS: StoreOptions = StoreOptions { dim: 2, init_scale: 0.1, seed: 1 };
const ROWS: u64 = 300;

/// A store with rows in the slabs and rows in the journal.
fn store(dir: &Path) -> Model {
    let mut model = Model::new(&OPTIONS);
    let mut store = Store::create(dir, &OPTIONS).unwrap();
    let step = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };
    for range in [0..ROWS, ROWS - 10..ROWS + 20] {
        store.checkpoint().unwrap();
        let ids: Vec<u64> = range.collect();
        let grads = vec![0.5; ids.len() * 2];
        model.adagrad(&ids, &grads, &step);
        store.adagrad(&ids, &grads, &step).unwrap();
    }
    store.commit().unwrap();
    model
}

fn expect_named(error: &Error, file: &str, context: &str) {
    let text = error.to_string();
    assert!(text.contains(file), "{context}: the message names the file: {text}");
    assert!(text.contains("; "), "{context}: the message says what to do: {text}");
    assert!(matches!(error, Error::Corrupt { .. }), "{context}: {error:?}");
}

#[test]
fn flipped_bits_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let model = store(dir.path());
    let journal_len = fs::metadata(dir.path().join("journal")).unwrap().len() as usize;
    let meta_len = fs::metadata(dir.path().join("meta.json")).unwrap().len() as usize;
    let index_len = fs::metadata(dir.path().join("index.table")).unwrap().len() as usize;
    // Rows from 290 on are in the journal, so their bytes in the slabs do not count.
    let in_slab = ROWS as usize - 10;
    let ids = 64 + 65536 * 8;
    let checks = ids + 65536 * 8;
    let cases = [
        ("meta.json", (0..meta_len).collect::<Vec<_>>()),
        ("journal", (0..64).chain((4096..journal_len).step_by(5)).collect()),
        ("index.table", (0..64).chain((64..index_len).step_by(41)).collect()),
        (
            "rows-00000.slab",
            (0..64)
                .chain((64..64 + in_slab * 8).step_by(31))
                .chain((ids..ids + in_slab * 8).step_by(31))
                .chain((checks..checks + in_slab * 4).step_by(31))
                .collect(),
        ),
        ("state-00000.slab", (0..64).chain((64..64 + in_slab * 16).step_by(31)).collect()),
    ];
    for (file, places) in cases {
        let path = dir.path().join(file);
        let good = fs::read(&path).unwrap();
        let file_on_disk = fs::OpenOptions::new().write(true).open(&path).unwrap();
        for at in places {
            file_on_disk.write_all_at(&[good[at] ^ 1 << (at % 8)], at as u64).unwrap();
            let context = format!("bit {} of byte {at} of {file}", at % 8);
            expect_named(&Store::open(dir.path()).expect_err(&context), file, &context);
            if at % 50 == 0 && !file.starts_with("state") {
                expect_named(&StoreReader::open(dir.path()).expect_err(&context), file, &context);
            }
        }
        fs::write(&path, &good).unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        model.check_state(&mut store);
    }
}

#[test]
fn truncated_and_missing_files_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = store(dir.path());
    for file in ["meta.json", "journal", "index.table", "rows-00000.slab", "state-00000.slab"] {
        let path = dir.path().join(file);
        let good = fs::read(&path).unwrap();
        for len in [0, 10, 64, good.len() / 2, good.len() - 2] {
            fs::write(&path, &good[..len.min(good.len() - 2)]).unwrap();
            let context = format!("{len} bytes of {file}");
            expect_named(&Store::open(dir.path()).expect_err(&context), file, &context);
        }
        fs::write(&path, &good).unwrap();
    }
    for file in ["rows-00000.slab", "state-00000.slab"] {
        let (path, aside) = (dir.path().join(file), dir.path().join("aside"));
        fs::rename(&path, &aside).unwrap();
        expect_named(&Store::open(dir.path()).unwrap_err(), file, "missing");
        fs::rename(&aside, &path).unwrap();
    }
    model.check_store(&Store::open(dir.path()).unwrap());
}

#[test]
fn a_lost_index_is_rebuilt_by_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    let model = store(dir.path());
    fs::remove_file(dir.path().join("index.table")).unwrap();
    expect_named(&StoreReader::open(dir.path()).unwrap_err(), "index.table", "missing");
    model.check_store(&Store::open(dir.path()).unwrap());
    model.check_reader(&StoreReader::open(dir.path()).unwrap());
}

#[test]
fn an_index_that_was_not_verified_leads_a_writer_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (training, serving) = (dir.path().join("training"), dir.path().join("serving"));
    store(&training);
    let store = Store::open(&training).unwrap();
    let (dim, ids) = (store.dim(), store.ids().collect::<Vec<u64>>());
    store.snapshot_into(&serving, RowFormat::F32).unwrap();
    let file = serving.join("index.table");
    let sound = fs::read(&file).unwrap();
    for at in (64..sound.len() - 4).step_by(37) {
        let mut damaged = sound.clone();
        damaged[at..at + 4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        fs::write(&file, &damaged).unwrap();
        // Opened unread, damage may go unnoticed; it must not end the process.
        let Ok(mut store) = ServingStore::open(&serving, Verify::Journal) else { continue };
        store.upsert_rows(&ids, &vec![0.5; ids.len() * dim]).unwrap();
    }
}

#[test]
fn serving_does_not_need_optimizer_state() {
    let dir = tempfile::tempdir().unwrap();
    let model = store(dir.path());
    fs::remove_file(dir.path().join("state-00000.slab")).unwrap();
    model.check_reader(&StoreReader::open(dir.path()).unwrap());
}

#[test]
fn files_of_another_store_or_version_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    store(&here);
    let options = StoreOptions { dim: 3, ..OPTIONS };
    let mut other = Store::create(&there, &options).unwrap();
    other.gather_or_init(&[1], &mut [0.0; 3]).unwrap();
    other.checkpoint().unwrap();
    drop(other);
    for file in ["journal", "rows-00000.slab", "state-00000.slab"] {
        let good = fs::read(here.join(file)).unwrap();
        fs::copy(there.join(file), here.join(file)).unwrap();
        expect_named(&Store::open(&here).unwrap_err(), file, "foreign");
        fs::write(here.join(file), good).unwrap();
    }
    let meta = fs::read_to_string(here.join("meta.json")).unwrap();
    let newer = meta.replace("\"format_version\": 2", "\"format_version\": 3, \"new\": 0");
    assert_ne!(meta, newer);
    fs::write(here.join("meta.json"), newer).unwrap();
    let error = Store::open(&here).unwrap_err();
    assert!(matches!(error, Error::Version { found: 3, supported: 2, .. }), "{error}");
    fs::remove_file(here.join("meta.json")).unwrap();
    let error = Store::open(&here).unwrap_err();
    assert!(matches!(error, Error::NotAStore { .. }), "{error}");
    let error = Store::create(&here, &OPTIONS).unwrap_err();
    assert!(
        matches!(error, Error::AlreadyExists { .. }),
        "what is left is not overwritten: {error}"
    );
}

#[test]
fn bad_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let bad = [
        StoreOptions { dim: 0, ..OPTIONS },
        StoreOptions { dim: 4097, ..OPTIONS },
        StoreOptions { init_scale: f32::NAN, ..OPTIONS },
        StoreOptions { init_scale: -1.0, ..OPTIONS },
    ];
    for options in bad {
        let error = Store::create(dir.path(), &options).unwrap_err();
        assert!(matches!(error, Error::Options(_)), "{error}");
    }
    drop(Store::create(dir.path(), &OPTIONS).unwrap());
    let error = Store::create(dir.path(), &OPTIONS).unwrap_err();
    assert!(matches!(error, Error::AlreadyExists { .. }), "{error}");
    assert!(Store::open(dir.path()).unwrap().is_empty());
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = store(dir.path());
    let mut store = Store::open(dir.path()).unwrap();
    let step = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };
    for bad in [f32::NAN, f32::INFINITY, 1e30] {
        let error = store.adagrad(&[1, 2, 9999], &[1.0, 1.0, 1.0, bad, 1.0, 1.0], &step);
        assert!(matches!(error, Err(Error::NotFinite { id: 2 })), "{error:?}");
    }
    model.check_state(&mut store);
}

#[test]
#[should_panic(expected = "out must be [ids.len(), dim]")]
fn a_slice_of_the_wrong_length_panics() {
    let dir = tempfile::tempdir().unwrap();
    Store::create(dir.path(), &OPTIONS).unwrap().gather(&[1, 2], &mut [0.0; 3]).unwrap();
}
