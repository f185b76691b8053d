//! A run of sorted records: in memory, and on its way to disk.

use std::fs::File;
use std::hint::black_box;
use std::io::{self, BufWriter, ErrorKind, Seek as _, Write as _};
use std::ops::Range;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use super::merge::Merge;
use super::{MAX_RUNS, READ_BYTES, SortKey, SortedRecord};
use crate::error::{CommonErrors as _, Error, Result};

/// The records of a run that are loaded together when they are written.
const TOUCHED_AHEAD: usize = 64;

/// Records that are collected, and then sorted, in memory.
#[derive(Debug, Default)]
pub(crate) struct SortRun<const N: usize> {
    entries: Vec<RunEntry<N>>,
    /// The records, one after the other as they came.
    bytes: Vec<u8>,
}

/// The place of a record. Those of equal keys are sorted by it, that is, as they came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct RunEntry<const N: usize> {
    key: SortKey<N>,
    start: u32,
    len: u32,
}

impl<const N: usize> SortRun<N> {
    pub(super) fn push(&mut self, key: SortKey<N>, bytes: &[u8]) {
        let position = |at: usize| u32::try_from(at).expect("a run has less than 4 GiB");
        let (start, len) = (position(self.bytes.len()), position(bytes.len()));
        self.entries.push(RunEntry { key, start, len });
        self.bytes.extend_from_slice(bytes);
    }

    /// The bytes that it takes.
    pub(super) fn size(&self) -> usize {
        self.bytes.len() + self.entries.len() * size_of::<RunEntry<N>>()
    }

    pub(super) fn sort(&mut self) {
        self.entries.sort_unstable();
    }

    /// The record at a place, once they are sorted.
    pub(super) fn record(&self, at: usize) -> Option<SortedRecord<'_, N>> {
        let &RunEntry { key, start, len } = self.entries.get(at)?;
        Some(SortedRecord { key, bytes: &self.bytes[start as usize..][..len as usize] })
    }

    /// Loads the records at some places into the processor's cache: they lie anywhere in memory,
    /// and it waits for several of them at a time if nothing else has to be done with them.
    fn touch(&self, places: Range<usize>) {
        let records = places.map_while(|at| self.record(at)).flat_map(|record| {
            [record.bytes.first(), record.bytes.last()].into_iter().flatten().copied()
        });
        black_box(records.fold(0, |sum, byte| sum ^ byte));
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.bytes.clear();
    }
}

/// A thread that sorts and writes runs.
pub(super) struct RunWriter<const N: usize> {
    to_write: SyncSender<SortRun<N>>,
    /// Runs that were written, to be filled again.
    written: Receiver<SortRun<N>>,
    /// Gone once it was seen to end.
    thread: Option<JoinHandle<Result<Vec<File>>>>,
}

impl<const N: usize> RunWriter<N> {
    pub(super) fn start(dir: &Path) -> Result<RunWriter<N>> {
        // Two runs are in memory: one that is collected, and one that is sorted.
        let (to_write, full) = sync_channel::<SortRun<N>>(1);
        let (emptied, written) = sync_channel(1);
        let _ = emptied.send(SortRun::default());
        let dir = dir.to_path_buf();
        let write_all = move || {
            let mut files = Vec::new();
            for mut run in full {
                write_run(&dir, &mut files, &mut run)?;
                run.clear();
                let _ = emptied.send(run);
            }
            Ok(files)
        };
        let thread = thread::Builder::new()
            .name("sort".to_owned())
            .spawn(write_all)
            .map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
        Ok(RunWriter { to_write, written, thread: Some(thread) })
    }

    /// Hands a run over, and takes an empty one.
    ///
    /// # Errors
    /// An earlier run could not be written.
    pub(super) fn write(&mut self, run: SortRun<N>) -> Result<SortRun<N>> {
        let empty = self.written.recv().ok().filter(|_| self.to_write.send(run).is_ok());
        match empty {
            Some(empty) => Ok(empty),
            None => self.join().and(Err(Error::internal("the sort ended early"))),
        }
    }

    /// The files of the runs, in the order in which they came.
    pub(super) fn finish(mut self) -> Result<Vec<File>> {
        drop(std::mem::replace(&mut self.to_write, sync_channel(0).0));
        self.join()
    }

    fn join(&mut self) -> Result<Vec<File>> {
        let thread = self.thread.take().expect("nothing is written behind an error");
        thread.join().unwrap_or_else(|panic| resume_unwind(panic))
    }
}

/// Sorts a run and writes it behind the others.
fn write_run<const N: usize>(
    dir: &Path,
    files: &mut Vec<File>,
    run: &mut SortRun<N>,
) -> Result<()> {
    run.sort();
    let mut file = RunFile::create(dir)?;
    for start in (0..run.entries.len()).step_by(TOUCHED_AHEAD) {
        run.touch(start..start + TOUCHED_AHEAD);
        for at in start..start + TOUCHED_AHEAD {
            run.record(at).map_or(Ok(()), |record| file.write(record))?;
        }
    }
    files.push(file.reread()?);
    if files.len() < MAX_RUNS {
        return Ok(());
    }
    let mut merge = Merge::<N>::new(dir, std::mem::take(files))?;
    let mut file = RunFile::create(dir)?;
    let mut written = Ok(());
    while written.is_ok() && merge.next(|record| written = file.write(record))? {}
    written?;
    files.push(file.reread()?);
    Ok(())
}

/// A run that is written.
struct RunFile<'a> {
    dir: &'a Path,
    file: BufWriter<File>,
}

impl RunFile<'_> {
    fn create(dir: &Path) -> Result<RunFile<'_>> {
        let file = tempfile::tempfile_in(dir).map_err(full(dir))?;
        Ok(RunFile { dir, file: BufWriter::with_capacity(READ_BYTES, file) })
    }

    /// Writes a record as `RunReader` reads it.
    fn write<const N: usize>(&mut self, record: SortedRecord<'_, N>) -> Result<()> {
        let mut write = || {
            for part in record.key {
                self.file.write_all(&part.to_le_bytes())?;
            }
            let len = u32::try_from(record.bytes.len()).map_err(io::Error::other)?;
            self.file.write_all(&len.to_le_bytes())?;
            self.file.write_all(record.bytes)
        };
        write().map_err(full(self.dir))
    }

    /// The file, from its beginning.
    fn reread(self) -> Result<File> {
        let mut file =
            self.file.into_inner().map_err(|error| full(self.dir)(error.into_error()))?;
        file.rewind().map_err(Error::io(self.dir))?;
        Ok(file)
    }
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
