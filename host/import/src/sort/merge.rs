//! Runs on disk, read in the order of their keys.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
use std::fs::File;
use std::io::{self, ErrorKind, Read as _};
use std::path::{Path, PathBuf};

use super::{READ_BYTES, SortKey, SortedRecord};
use crate::error::{CommonErrors as _, Error, Result};
use crate::prefetch::Prefetch;

/// The records that a batch of merged ones holds, and how many batches wait.
const BATCH_RECORDS: usize = 4096;
const BATCHES_AHEAD: usize = 3;

/// The merged records of runs, which a thread reads ahead.
pub(crate) struct MergedRecords<const N: usize> {
    batches: Prefetch<RecordBatch<N>>,
    batch: RecordBatch<N>,
    next: usize,
}

/// Records, one after the other.
#[derive(Debug)]
struct RecordBatch<const N: usize> {
    keys: Vec<SortKey<N>>,
    bytes: Vec<u8>,
    /// Where each record ends in `bytes`.
    ends: Vec<usize>,
}

impl<const N: usize> RecordBatch<N> {
    fn with_capacity(bytes: usize) -> RecordBatch<N> {
        RecordBatch {
            keys: Vec::with_capacity(BATCH_RECORDS),
            bytes: Vec::with_capacity(bytes),
            ends: Vec::with_capacity(BATCH_RECORDS),
        }
    }

    fn push(&mut self, record: SortedRecord<'_, N>) {
        self.keys.push(record.key);
        self.bytes.extend_from_slice(record.bytes);
        self.ends.push(self.bytes.len());
    }
}

impl<const N: usize> MergedRecords<N> {
    pub(super) fn start(dir: &Path, runs: Vec<File>) -> Result<MergedRecords<N>> {
        let dir = dir.to_path_buf();
        let batches = Prefetch::start("merge", BATCHES_AHEAD, move |to| {
            let mut merge = Merge::new(&dir, runs)?;
            let mut batch = RecordBatch::with_capacity(0);
            loop {
                let is_over = !merge.next(|record| batch.push(record))?;
                if batch.keys.len() == BATCH_RECORDS || is_over {
                    let empty = RecordBatch::with_capacity(batch.bytes.len());
                    if !to.send(std::mem::replace(&mut batch, empty)) || is_over {
                        return Ok(());
                    }
                }
            }
        })?;
        Ok(MergedRecords { batches, batch: RecordBatch::with_capacity(0), next: 0 })
    }

    pub(super) fn next(&mut self) -> Result<Option<SortedRecord<'_, N>>> {
        while self.next == self.batch.keys.len() {
            let Some(batch) = self.batches.next()? else { return Ok(None) };
            (self.batch, self.next) = (batch, 0);
        }
        let (at, batch) = (self.next, &self.batch);
        self.next += 1;
        let start = at.checked_sub(1).map_or(0, |before| batch.ends[before]);
        Ok(Some(SortedRecord { key: batch.keys[at], bytes: &batch.bytes[start..batch.ends[at]] }))
    }
}

/// The records of several runs in one order; of equal keys those of an earlier run come first.
pub(super) struct Merge<const N: usize> {
    dir: PathBuf,
    runs: Vec<RunReader>,
    /// The next key of each run that has one, with the number of the run, which decides among
    /// equal ones.
    order: BinaryHeap<Reverse<(SortKey<N>, usize)>>,
}

impl<const N: usize> Merge<N> {
    pub(super) fn new(dir: &Path, files: Vec<File>) -> Result<Merge<N>> {
        let mut runs: Vec<RunReader> = files.into_iter().map(RunReader::new).collect();
        let mut order = BinaryHeap::with_capacity(runs.len());
        for (number, run) in runs.iter_mut().enumerate() {
            let key = run.next_key().map_err(Error::io(dir))?;
            order.extend(key.map(|key| Reverse((key, number))));
        }
        Ok(Merge { dir: dir.to_path_buf(), runs, order })
    }

    /// Calls `add` with the next record; `false` at the end.
    pub(super) fn next(&mut self, add: impl FnOnce(SortedRecord<'_, N>)) -> Result<bool> {
        let Some(mut first) = self.order.peek_mut() else { return Ok(false) };
        let Reverse((key, number)) = *first;
        let run = &mut self.runs[number];
        add(SortedRecord { key, bytes: run.record() });
        // In its place, since the next record of a run is often near.
        match run.next_key().map_err(Error::io(&self.dir))? {
            Some(key) => *first = Reverse((key, number)),
            None => _ = PeekMut::pop(first),
        }
        Ok(true)
    }
}

/// Reads the records of a run. Each is its key, its length and itself.
struct RunReader {
    file: File,
    buffer: Vec<u8>,
    /// The bytes of the buffer that were read and not used yet; the current record comes before.
    unused: std::ops::Range<usize>,
    /// The length of the current record.
    len: usize,
}

impl RunReader {
    fn new(file: File) -> RunReader {
        RunReader { file, buffer: vec![0; READ_BYTES], unused: 0..0, len: 0 }
    }

    /// Goes on to the next record, and tells its key; none at the end.
    fn next_key<const N: usize>(&mut self) -> io::Result<Option<SortKey<N>>> {
        self.len = 0;
        if !self.fill(N * 8 + 4)? {
            return Ok(None);
        }
        let mut key = [0; N];
        for part in &mut key {
            *part = u64::from_le_bytes(self.take());
        }
        let len = u32::from_le_bytes(self.take()) as usize;
        if !self.fill(len)? {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.unused.start += len;
        self.len = len;
        Ok(Some(key))
    }

    /// The record whose key was told last.
    fn record(&self) -> &[u8] {
        &self.buffer[self.unused.start - self.len..self.unused.start]
    }

    fn take<const BYTES: usize>(&mut self) -> [u8; BYTES] {
        let bytes = self.buffer[self.unused.start..][..BYTES].try_into().expect("so many");
        self.unused.start += BYTES;
        bytes
    }

    /// Makes so many bytes available; `false` if the run is at its end.
    fn fill(&mut self, bytes: usize) -> io::Result<bool> {
        if self.unused.len() >= bytes {
            return Ok(true);
        }
        self.buffer.copy_within(self.unused.clone(), 0);
        self.unused = 0..self.unused.len();
        if self.buffer.len() < bytes {
            self.buffer.resize(bytes, 0);
        }
        while self.unused.len() < bytes {
            match self.file.read(&mut self.buffer[self.unused.end..]) {
                Ok(0) if self.unused.is_empty() => return Ok(false),
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => self.unused.end += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }
}
