//! Sorting more records than memory holds.
//!
//! Records are collected, in their encoded form, up to [`RUN_BYTES`]. Then they are sorted and
//! written to a file without a name, which the system removes when the process ends, however it
//! does. At the end these runs are merged. When there are [`MAX_RUNS`] of them, they are merged
//! into one, so that reading them takes at most `MAX_RUNS * READ_BYTES` at a time. The order is
//! stable: what has equal keys stays as it came.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{CommonErrors as _, Error, Result};

/// The memory of the records that are collected, with what sorting them needs.
pub(crate) const RUN_BYTES: usize = 256 << 20;

/// The most runs that are merged at a time.
const MAX_RUNS: usize = 128;

/// The memory through which a run is read or written.
const READ_BYTES: usize = 1 << 19;

/// What a record is sorted by.
pub(crate) trait SortKey: Copy + Ord + Send + Sync + Serialize + DeserializeOwned {}

impl<K: Copy + Ord + Send + Sync + Serialize + DeserializeOwned> SortKey for K {}

/// Collects records to be sorted.
pub(crate) struct ExternalSort<K> {
    /// The folder of the runs.
    dir: PathBuf,
    run_bytes: usize,
    entries: Vec<RunEntry<K>>,
    /// The encoded records, one after the other.
    encoded: Vec<u8>,
    runs: Vec<BufReader<File>>,
}

/// A record in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct RunEntry<K> {
    key: K,
    start: usize,
    len: usize,
}

/// A record with its key, and its encoded form.
pub(crate) struct SortedRecord<K> {
    pub(crate) key: K,
    encoded: Vec<u8>,
}

impl<K> SortedRecord<K> {
    /// The record that was collected.
    pub(crate) fn decode<T: DeserializeOwned>(&self) -> T {
        postcard::from_bytes(&self.encoded).expect("encoded by the sort")
    }
}

impl<K: SortKey> ExternalSort<K> {
    /// A sort whose runs are of [`RUN_BYTES`] and are written to `dir`.
    pub(crate) fn new(dir: &Path) -> ExternalSort<K> {
        ExternalSort::with_run_bytes(dir, RUN_BYTES)
    }

    /// A sort whose runs are of `run_bytes`.
    pub(crate) fn with_run_bytes(dir: &Path, run_bytes: usize) -> ExternalSort<K> {
        let (entries, encoded, runs) = Default::default();
        ExternalSort { dir: dir.to_path_buf(), run_bytes, entries, encoded, runs }
    }

    /// Collects a record.
    ///
    /// # Errors
    /// A run cannot be written.
    pub(crate) fn push(&mut self, key: K, record: &impl Serialize) -> Result<()> {
        let start = self.encoded.len();
        let encoded = std::mem::take(&mut self.encoded);
        self.encoded = postcard::to_extend(record, encoded)
            .map_err(|error| Error::internal(format!("a record cannot be encoded: {error}")))?;
        self.entries.push(RunEntry { key, start, len: self.encoded.len() - start });
        let used = self.encoded.len() + self.entries.len() * size_of::<RunEntry<K>>();
        if used >= self.run_bytes { self.write_run() } else { Ok(()) }
    }

    /// All records in the order of their keys.
    ///
    /// # Errors
    /// A run cannot be written or read.
    pub(crate) fn finish(mut self) -> Result<SortedRecords<K>> {
        if self.runs.is_empty() {
            // As they came within equal keys, because they lie in that order.
            self.entries.sort_unstable();
            let entries = self.entries.into_iter();
            return Ok(SortedRecords::InMemory { entries, encoded: self.encoded });
        }
        self.write_run()?;
        // Merging needs none of it.
        (self.entries, self.encoded) = Default::default();
        Merge::new(&self.dir, self.runs).map(SortedRecords::Merged)
    }

    fn write_run(&mut self) -> Result<()> {
        self.entries.sort_unstable();
        let mut run = new_run(&self.dir)?;
        for RunEntry { key, start, len } in self.entries.drain(..) {
            write_record(&mut run, key, &self.encoded[start..start + len])
                .map_err(full(&self.dir))?;
        }
        self.encoded.clear();
        self.runs.push(reread(&self.dir, run)?);
        if self.runs.len() < MAX_RUNS {
            return Ok(());
        }
        let mut merge = Merge::<K>::new(&self.dir, std::mem::take(&mut self.runs))?;
        let mut run = new_run(&self.dir)?;
        while let Some(record) = merge.next()? {
            write_record(&mut run, record.key, &record.encoded).map_err(full(&self.dir))?;
        }
        self.runs.push(reread(&self.dir, run)?);
        Ok(())
    }
}

/// Sorted records, one after the other.
pub(crate) enum SortedRecords<K> {
    /// They did not fill a run.
    InMemory { entries: std::vec::IntoIter<RunEntry<K>>, encoded: Vec<u8> },
    /// They are on disk.
    Merged(Merge<K>),
}

impl<K: SortKey> SortedRecords<K> {
    /// The next record; none at the end.
    ///
    /// # Errors
    /// A run cannot be read.
    pub(crate) fn next(&mut self) -> Result<Option<SortedRecord<K>>> {
        match self {
            SortedRecords::Merged(merge) => merge.next(),
            SortedRecords::InMemory { entries, encoded } => {
                Ok(entries.next().map(|RunEntry { key, start, len }| SortedRecord {
                    key,
                    encoded: encoded[start..start + len].to_vec(),
                }))
            }
        }
    }
}

/// Reads runs in the order of their keys.
pub(crate) struct Merge<K> {
    dir: PathBuf,
    runs: Vec<BufReader<File>>,
    /// The next record of each run that has one.
    next: Vec<Option<SortedRecord<K>>>,
    /// The keys of these, with the number of the run, which decides among equal ones.
    order: BinaryHeap<Reverse<(K, usize)>>,
}

impl<K: SortKey> Merge<K> {
    fn new(dir: &Path, runs: Vec<BufReader<File>>) -> Result<Merge<K>> {
        let mut merge = Merge {
            dir: dir.to_path_buf(),
            next: runs.iter().map(|_| None).collect(),
            order: BinaryHeap::with_capacity(runs.len()),
            runs,
        };
        for run in 0..merge.runs.len() {
            merge.advance(run)?;
        }
        Ok(merge)
    }

    fn next(&mut self) -> Result<Option<SortedRecord<K>>> {
        let Some(Reverse((_, run))) = self.order.pop() else { return Ok(None) };
        let record = self.next[run].take();
        self.advance(run)?;
        Ok(record)
    }

    /// Reads the next record of a run.
    fn advance(&mut self, run: usize) -> Result<()> {
        let record = read_record(&mut self.runs[run]).map_err(Error::io(&self.dir))?;
        if let Some(record) = &record {
            self.order.push(Reverse((record.key, run)));
        }
        self.next[run] = record;
        Ok(())
    }
}

fn new_run(dir: &Path) -> Result<BufWriter<File>> {
    let file = tempfile::tempfile_in(dir).map_err(full(dir))?;
    Ok(BufWriter::with_capacity(READ_BYTES, file))
}

/// A run that was written, from its beginning.
fn reread(dir: &Path, run: BufWriter<File>) -> Result<BufReader<File>> {
    let mut file = run.into_inner().map_err(|error| full(dir)(error.into_error()))?;
    file.rewind().map_err(Error::io(dir))?;
    Ok(BufReader::with_capacity(READ_BYTES, file))
}

/// Says what the space is needed for.
fn full(dir: &Path) -> impl FnOnce(io::Error) -> Error {
    let dir = dir.to_path_buf();
    move |error| match error.kind() {
        ErrorKind::StorageFull => Error::data(
            dir,
            "the disk is full; sorting needs about as much space here as the data set itself twice",
        ),
        _ => Error::io(dir)(error),
    }
}

/// A record is its key and itself, behind the lengths of both.
fn write_record<K: Serialize>(run: &mut impl Write, key: K, encoded: &[u8]) -> io::Result<()> {
    let key = postcard::to_stdvec(&key).map_err(io::Error::other)?;
    for len in [key.len(), encoded.len()] {
        run.write_all(&u32::try_from(len).map_err(io::Error::other)?.to_le_bytes())?;
    }
    run.write_all(&key)?;
    run.write_all(encoded)
}

fn read_record<K: DeserializeOwned>(run: &mut impl Read) -> io::Result<Option<SortedRecord<K>>> {
    let mut lens = [[0; 4]; 2];
    match run.read_exact(&mut lens[0]) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    run.read_exact(&mut lens[1])?;
    let [key, record] = lens.map(|len| u32::from_le_bytes(len) as usize);
    let mut encoded = vec![0; key + record];
    run.read_exact(&mut encoded)?;
    let key_of = postcard::from_bytes(&encoded[..key]).map_err(io::Error::other)?;
    encoded.drain(..key);
    Ok(Some(SortedRecord { key: key_of, encoded }))
}

#[cfg(test)]
mod tests {
    use hypercast_core::hash::mix64;

    use super::*;

    /// Sorts `0..count` by a key that many of them share, in runs of `run_bytes`.
    fn sorted(count: u64, run_bytes: usize) -> (Vec<(u8, String)>, usize) {
        let dir = tempfile::tempdir().unwrap();
        let mut sort = ExternalSort::with_run_bytes(dir.path(), run_bytes);
        let mut most = 0;
        for number in 0..count {
            sort.push((mix64(number) % 50) as u8, &format!("record {number:06}")).unwrap();
            most = most.max(sort.encoded.len() + sort.entries.len() * size_of::<RunEntry<u8>>());
            assert!(sort.runs.len() < MAX_RUNS);
        }
        let mut records = sort.finish().unwrap();
        let mut all = Vec::new();
        while let Some(record) = records.next().unwrap() {
            all.push((record.key, record.decode()));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "runs have no names");
        (all, most)
    }

    #[test]
    fn runs_on_disk_give_the_order_of_a_stable_sort() {
        let mut expected: Vec<(u8, String)> = (0..30_000)
            .map(|number| ((mix64(number) % 50) as u8, format!("record {number:06}")))
            .collect();
        expected.sort_by_key(|(key, _)| *key);
        // In memory, in a few runs, and in so many that they are merged on the way.
        for run_bytes in [RUN_BYTES, 200_000, 4_000] {
            let (records, most) = sorted(30_000, run_bytes);
            assert!(records == expected, "runs of {run_bytes} bytes");
            assert!(most < run_bytes + 100, "{most} bytes in memory, not {run_bytes}");
        }
        assert_eq!(sorted(0, 100).0, []);
    }
}
