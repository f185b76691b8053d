//! Files that are cut while they are mapped: reads fail and name the file, nothing that was read
//! meanwhile becomes durable, and a file that is as it was is used again.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use hypercast_store::{
    Adagrad, Error, Result, RowFormat, ServingStore, Store, StoreOptions, StoreReader, Verify,
};

const OPTIONS: StoreOptions = StoreOptions { dim: 4, init_scale: 0.1, seed: 3 };
const IDS: u64 = 1000;
const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-6 };
/// Longer than a file whose content was wrong is left alone.
const RETRY: Duration = Duration::from_millis(1100);

fn ids() -> Vec<u64> {
    (0..IDS).collect()
}

/// A snapshot in `dir`, and its rows.
fn snapshot(dir: &Path) -> Vec<f32> {
    let training = tempfile::tempdir().unwrap();
    let mut store = Store::create(training.path(), &OPTIONS).unwrap();
    let mut rows = vec![0.0; ids().len() * OPTIONS.dim];
    store.gather_or_init(&ids(), &mut rows).unwrap();
    store.checkpoint().unwrap();
    store.snapshot_into(dir, RowFormat::F32).unwrap();
    rows
}

/// Overwrites the file in place, as `cp` does, so that its mappings see it.
fn overwrite(path: &Path, bytes: &[u8]) {
    OpenOptions::new().write(true).truncate(true).open(path).unwrap().write_all(bytes).unwrap();
}

fn expect_lost<T: std::fmt::Debug>(result: Result<T>, file: &str, context: &str) {
    match result {
        Err(error @ Error::FileLost { .. }) => {
            assert!(error.to_string().contains(file), "{context}: {error}");
        }
        other => panic!("{context}: {other:?}"),
    }
}

#[test]
fn a_cut_file_is_named_until_it_is_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (read, served) = (dir.path().join("read"), dir.path().join("served"));
    let rows = snapshot(&read);
    assert_eq!(snapshot(&served), rows);
    let reader = StoreReader::open(&read).unwrap();
    let mut writer = ServingStore::open(&served, Verify::Full).unwrap();
    let handle = writer.handle().unwrap();
    for (dir, gather, check) in [
        (
            &read,
            &(|out: &mut [f32]| reader.gather(&ids(), out)) as &dyn Fn(&mut [f32]) -> Result<usize>,
            &(|| reader.check_files()) as &dyn Fn() -> Result<()>,
        ),
        (&served, &|out| handle.gather(&ids(), out), &|| handle.check_files()),
    ] {
        for file in ["index.table", "rows-00000.slab"] {
            let path = dir.join(file);
            let good = fs::read(&path).unwrap();
            let mut out = vec![f32::NAN; rows.len()];
            overwrite(&path, &[]);
            expect_lost(gather(&mut out), file, "empty");
            expect_lost(gather(&mut out), file, "still empty");
            overwrite(&path, &good[..good.len() - 1]);
            expect_lost(check(), file, "short of a byte");
            let mut flipped = good.clone();
            flipped[70] ^= 1;
            overwrite(&path, &flipped);
            expect_lost(gather(&mut out), file, "with a flipped bit");
            overwrite(&path, &good);
            std::thread::sleep(RETRY);
            check().unwrap();
            assert_eq!((gather(&mut out).unwrap(), &out), (0, &rows), "{file} is whole again");
        }
    }
}

#[test]
fn a_cut_file_that_nobody_reads_is_found_by_its_length() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(&dir.path().join("s"));
    let reader = StoreReader::open(dir.path().join("s")).unwrap();
    let path = dir.path().join("s/rows-00000.slab");
    let good = fs::read(&path).unwrap();
    reader.check_files().unwrap();
    // Within its last page, whose rest reads as zeros without a signal.
    OpenOptions::new().write(true).open(&path).unwrap().set_len(good.len() as u64 - 1).unwrap();
    expect_lost(reader.check_files(), "rows-00000.slab", "short of a byte");
    expect_lost(reader.gather(&[1], &mut [0.0; 4]), "rows-00000.slab", "short of a byte");
    // Another file in its place, as `rsync` leaves it.
    fs::write(dir.path().join("copy"), &good).unwrap();
    fs::rename(dir.path().join("copy"), &path).unwrap();
    reader.check_files().unwrap();
    assert_eq!(reader.gather(&[1], &mut [0.0; 4]).unwrap(), 0);
}

#[test]
fn what_a_writer_read_of_a_cut_file_never_becomes_durable() {
    for file in ["rows-00000.slab", "state-00000.slab", "index.table"] {
        let dir = tempfile::tempdir().unwrap();
        let mut rows = vec![0.0; ids().len() * OPTIONS.dim];
        let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
        store.gather_or_init(&ids(), &mut rows).unwrap();
        store.checkpoint().unwrap();
        let good = fs::read(dir.path().join(file)).unwrap();
        overwrite(&dir.path().join(file), &[]);
        store.adagrad(&[5], &[1.0; 4], &STEP).unwrap();
        overwrite(&dir.path().join(file), &good);
        expect_lost(store.commit(), file, "a commit");
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        let mut out = vec![f32::NAN; rows.len()];
        store.gather(&ids(), &mut out).unwrap();
        assert_eq!(out, rows, "{file}");
    }
}
