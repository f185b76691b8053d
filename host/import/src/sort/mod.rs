//! Sorting more records than memory holds.
//!
//! Records are bytes below keys of a few numbers. They are collected up to [`RUN_BYTES`]; then
//! another thread sorts them and writes them to a file without a name, which the system removes
//! when the process ends, however it does, while the next ones are collected. At the end a thread
//! merges these runs and stays a few batches ahead of whoever reads them. When there are
//! [`MAX_RUNS`] of them, they are merged into one, so that reading them takes at most `MAX_RUNS *
//! READ_BYTES` at a time. The order is stable: what has equal keys stays as it came.

mod merge;
mod run;

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use self::merge::MergedRecords;
use self::run::{RunWriter, SortRun};
use crate::error::{CommonErrors as _, Error, Result};

/// The memory of the records that are collected. As many are sorted and written meanwhile.
pub(crate) const RUN_BYTES: usize = 128 << 20;

/// The most runs that are merged at a time.
const MAX_RUNS: usize = 128;

/// The memory through which a run is read or written.
const READ_BYTES: usize = 1 << 19;

/// What a record is sorted by: the first number, then the second, and so on.
pub(crate) type SortKey<const N: usize> = [u64; N];

/// A time as a part of a key.
pub(crate) fn time_part(time_ms: i64) -> u64 {
    time_ms as u64 ^ 1 << 63
}

/// The time of which this is [`time_part`].
pub(crate) fn time_of(part: u64) -> i64 {
    (part ^ 1 << 63) as i64
}

/// Collects records to be sorted.
pub(crate) struct ExternalSort<const N: usize> {
    /// The folder of the runs.
    dir: PathBuf,
    run_bytes: usize,
    run: SortRun<N>,
    /// Writes runs, if there was more than one.
    writer: Option<RunWriter<N>>,
}

/// A record with its key.
pub(crate) struct SortedRecord<'a, const N: usize> {
    pub(crate) key: SortKey<N>,
    pub(crate) bytes: &'a [u8],
}

impl<const N: usize> SortedRecord<'_, N> {
    /// The record that [`ExternalSort::push`] encoded.
    pub(crate) fn decode<T: DeserializeOwned>(&self) -> T {
        postcard::from_bytes(self.bytes).expect("encoded by the sort")
    }
}

impl<const N: usize> ExternalSort<N> {
    /// A sort whose runs are of [`RUN_BYTES`] and are written to `dir`.
    pub(crate) fn new(dir: &Path) -> ExternalSort<N> {
        ExternalSort::with_run_bytes(dir, RUN_BYTES)
    }

    /// A sort whose runs are of `run_bytes`.
    pub(crate) fn with_run_bytes(dir: &Path, run_bytes: usize) -> ExternalSort<N> {
        ExternalSort { dir: dir.to_path_buf(), run_bytes, run: SortRun::default(), writer: None }
    }

    /// Collects a record, encoded.
    ///
    /// # Errors
    /// A run cannot be written.
    pub(crate) fn push(&mut self, key: SortKey<N>, record: &impl Serialize) -> Result<()> {
        let encoded = postcard::to_stdvec(record)
            .map_err(|error| Error::internal(format!("a record cannot be encoded: {error}")))?;
        self.push_bytes(key, &encoded)
    }

    /// Collects a record as it is.
    ///
    /// # Errors
    /// A run cannot be written.
    pub(crate) fn push_bytes(&mut self, key: SortKey<N>, bytes: &[u8]) -> Result<()> {
        self.run.push(key, bytes);
        if self.run.size() < self.run_bytes {
            return Ok(());
        }
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => self.writer.insert(RunWriter::start(&self.dir)?),
        };
        self.run = writer.write(std::mem::take(&mut self.run))?;
        Ok(())
    }

    /// All records in the order of their keys.
    ///
    /// # Errors
    /// A run cannot be written or read.
    pub(crate) fn finish(mut self) -> Result<SortedRecords<N>> {
        let Some(mut writer) = self.writer else {
            self.run.sort();
            return Ok(SortedRecords::InMemory { run: self.run, next: 0 });
        };
        writer.write(self.run)?;
        MergedRecords::start(&self.dir, writer.finish()?).map(SortedRecords::Merged)
    }
}

/// Sorted records, one after the other.
pub(crate) enum SortedRecords<const N: usize> {
    /// They did not fill a run.
    InMemory { run: SortRun<N>, next: usize },
    /// They are on disk.
    Merged(MergedRecords<N>),
}

impl<const N: usize> SortedRecords<N> {
    /// The next record; none at the end.
    ///
    /// # Errors
    /// A run cannot be read.
    pub(crate) fn next(&mut self) -> Result<Option<SortedRecord<'_, N>>> {
        match self {
            SortedRecords::Merged(merged) => merged.next(),
            SortedRecords::InMemory { run, next } => {
                *next += 1;
                Ok(run.record(*next - 1))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use hypercast_core::hash::mix64;

    use super::*;

    /// Sorts `0..count` by a key that many of them share, in runs of `run_bytes`.
    fn sorted(count: u64, run_bytes: usize) -> Vec<(u64, String)> {
        let dir = tempfile::tempdir().unwrap();
        let mut sort = ExternalSort::with_run_bytes(dir.path(), run_bytes);
        for number in 0..count {
            sort.push([mix64(number) % 50], &format!("record {number:06}")).unwrap();
            assert!(sort.run.size() < run_bytes, "{} bytes in memory", sort.run.size());
        }
        let mut records = sort.finish().unwrap();
        let mut all = Vec::new();
        while let Some(record) = records.next().unwrap() {
            all.push((record.key[0], record.decode()));
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "runs have no names");
        all
    }

    #[test]
    fn runs_on_disk_give_the_order_of_a_stable_sort() {
        let mut expected: Vec<(u64, String)> =
            (0..30_000).map(|number| (mix64(number) % 50, format!("record {number:06}"))).collect();
        expected.sort_by_key(|(key, _)| *key);
        // In memory, in a few runs, and in so many that they are merged on the way.
        for run_bytes in [RUN_BYTES, 200_000, 4_000] {
            assert!(sorted(30_000, run_bytes) == expected, "runs of {run_bytes} bytes");
        }
        assert_eq!(sorted(0, 100), []);
    }

    #[test]
    fn times_are_in_order_on_both_sides_of_1970() {
        let times = [i64::MIN, -1, 0, 1, i64::MAX];
        assert!(times.map(time_part).is_sorted());
        assert_eq!(times.map(|time_ms| time_of(time_part(time_ms))), times);
    }

    #[test]
    fn whoever_stops_reading_stops_the_merge() {
        let dir = tempfile::tempdir().unwrap();
        let mut sort = ExternalSort::with_run_bytes(dir.path(), 100_000);
        (0..100_000).for_each(|number| sort.push_bytes([number], &[0; 100]).unwrap());
        let mut records = sort.finish().unwrap();
        assert_eq!(records.next().unwrap().unwrap().key, [0]);
        // Returns although batches wait to be taken.
        drop(records);
    }
}
