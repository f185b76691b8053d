//! Stores with changed files. Each must fail to open, or return only rows that were written.
//!
//! The latter holds if all checksums are verified; otherwise damaged rows may be returned.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use arbitrary::{Result, Unstructured};
use hypercast_store::{
    Adagrad, RowFormat, ServingStore, Store, StoreOptions, StoreReader, Verify, check,
};

use crate::edit;
use crate::model::folder;

const DIM: usize = 4;

/// The number of ids that were written.
const IDS: u64 = 60;

/// The files of a store, and the rows that it had at each commit.
struct WrittenStore {
    files: Vec<(PathBuf, Vec<u8>)>,
    rows: BTreeMap<u64, Vec<Vec<f32>>>,
    trains: bool,
}

/// Changes the files of a store and opens it.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let written = &written()[usize::from(u.arbitrary::<bool>()?)];
    let mut files: Vec<(PathBuf, Vec<u8>)> = written.files.clone();
    for _ in 0..u.int_in_range(1..=3)? {
        let at = u.choose_index(files.len())?;
        match u.int_in_range(0..=7)? {
            0 => drop(files.remove(at)),
            1 => files[at].1.clear(),
            // Most of a slab is empty. Its data is at the beginning of each part.
            2..=4 if files[at].1.len() > 4096 => {
                let place = u.choose_index(files[at].1.len() / 4096)? * 4096;
                let mut tail = files[at].1.split_off(place);
                let rest = tail.split_off(tail.len().min(4096));
                let size = tail.len();
                edit::edits(u, &mut tail, 3)?;
                // A wrong size is found first. Keep it mostly, to test the other checks.
                if u.ratio(7, 8)? {
                    tail.resize(size, 0);
                }
                files[at].1.extend(tail);
                files[at].1.extend(rest);
            }
            _ => edit::edits(u, &mut files[at].1, 3)?,
        }
        if files.is_empty() {
            break;
        }
    }
    let dir = folder();
    for (name, bytes) in &files {
        fs::write(dir.path().join(name), bytes).expect("a file");
    }
    open(dir.path(), written, u.arbitrary()?);
    Ok(())
}

/// Files are damaged before they are opened, and not cut afterwards.
const WHOLE: &str = "no file is cut while it is open";

fn open(dir: &Path, written: &WrittenStore, deep: bool) {
    let ids: Vec<u64> = (0..IDS).chain([u64::MAX]).collect();
    let mut out = vec![0.0; ids.len() * DIM];
    if let Ok(checked) = check(dir, &mut |_| ()) {
        assert!(checked.rows < usize::MAX);
    }
    for verify in [Verify::Full, Verify::Journal] {
        let Ok(reader) = StoreReader::open_with(dir, verify) else { continue };
        // With another width in `meta.json`, the rows cannot be compared.
        if reader.dim() != DIM {
            continue;
        }
        reader.gather(&ids, &mut out).expect(WHOLE);
        if verify == Verify::Full {
            assert_known(&ids, &out, written);
        }
        assert!(reader.ids().count() <= reader.len());
    }
    let verify = if deep { Verify::Full } else { Verify::Journal };
    if written.trains {
        let Ok(mut store) = Store::open_with(dir, verify) else { return };
        if store.dim() != DIM {
            return;
        }
        store.gather(&ids, &mut out).expect(WHOLE);
        if verify == Verify::Full {
            assert_known(&ids, &out, written);
        }
        let _ = learn(&mut store, 1).and_then(|()| store.checkpoint());
    } else {
        let Ok(mut store) = ServingStore::open(dir, verify) else { return };
        if store.dim() != DIM {
            return;
        }
        store.gather(&ids, &mut out).expect(WHOLE);
        if verify == Verify::Full {
            assert_known(&ids, &out, written);
        }
        let taken = store.upsert_rows(&[3, 1000], &[1.0; 2 * DIM]);
        let _ = taken.and_then(|()| store.commit()).and_then(|_| store.checkpoint());
    }
}

fn assert_known(ids: &[u64], rows: &[f32], written: &WrittenStore) {
    for (id, row) in ids.iter().zip(rows.chunks(DIM)) {
        let known = written.rows.get(id).is_some_and(|rows| rows.iter().any(|known| known == row));
        assert!(known || row == [0.0; DIM], "row {id} was never written as {row:?}");
    }
}

fn learn(store: &mut Store, round: u64) -> hypercast_store::Result<()> {
    let ids: Vec<u64> = (0..IDS).filter(|id| id % (round + 1) == 0).collect();
    let mut rows = vec![0.0; ids.len() * DIM];
    store.gather_or_init(&ids, &mut rows)?;
    let grads: Vec<f32> = rows.iter().map(|value| value - 0.3 * round as f32).collect();
    store.adagrad(&ids, &grads, &Adagrad { learning_rate: 0.1, epsilon: 1e-8 })?;
    store.commit()?;
    Ok(())
}

/// A training store with rows in slabs and in the journal and with removed rows; and a serving
/// store, a snapshot of the first with further rows.
fn written() -> &'static [WrittenStore; 2] {
    static WRITTEN: OnceLock<[WrittenStore; 2]> = OnceLock::new();
    WRITTEN.get_or_init(|| {
        let dir = folder();
        let (training, serving) = (dir.path().join("training"), dir.path().join("serving"));
        let options = StoreOptions { dim: DIM, init_scale: 0.1, seed: 5 };
        let mut store = Store::create(&training, &options).expect("a store");
        let mut rows = BTreeMap::new();
        for round in 0..4 {
            learn(&mut store, round).expect("a commit");
            note(&mut rows, |ids, out| _ = store.gather(ids, out).expect(WHOLE));
            if round == 1 {
                store.checkpoint().expect("a checkpoint");
            }
        }
        store.remove_rows(&[5, 7]);
        store.commit().expect("a commit");
        store.snapshot_into(&serving, RowFormat::F32).expect("a snapshot");
        drop(store);
        let first = WrittenStore { files: files(&training), rows: rows.clone(), trains: true };
        let mut store = ServingStore::open(&serving, Verify::Full).expect("a snapshot");
        store.upsert_rows(&[2, 90], &[0.5; 2 * DIM]).expect("rows");
        store.commit().expect("a commit");
        note(&mut rows, |ids, out| _ = store.gather(ids, out).expect(WHOLE));
        drop(store);
        [first, WrittenStore { files: files(&serving), rows, trains: false }]
    })
}

fn note(rows: &mut BTreeMap<u64, Vec<Vec<f32>>>, gather: impl Fn(&[u64], &mut [f32])) {
    for id in 0..IDS {
        let mut row = vec![0.0; DIM];
        gather(&[id], &mut row);
        rows.entry(id).or_default().push(row);
    }
}

fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entry = |entry: std::io::Result<fs::DirEntry>| {
        let path = entry.expect("a readable folder").path();
        let bytes = fs::read(&path).expect("a readable file");
        (path.file_name().expect("a file has a name").into(), bytes)
    };
    let mut files: Vec<_> = fs::read_dir(dir).expect("a folder").map(entry).collect();
    files.sort();
    files
}
