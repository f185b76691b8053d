//! Writes a stream's segments: appends groups of calls with one write and one sync, begins new
//! segments and deletes old ones.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hypercast_core::atomic_dir;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::disk::{self, File, OpenMode, sync_dir};

use super::DirectoryLimits;
use super::commit_mark::{CommitFile, CommitMark};
use super::segment::{self, SegmentReader, SoundRecords};
use super::signal::AppendSignal;
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::group_commit::{AppendJob, CommitOutcome, CommitSink};
use crate::streams::ids::RecentIds;
use crate::streams::{Appended, Record, Topic};

/// How long [`SegmentWriter::open`] waits for another writer that is about to finish.
const LOCK_WAIT: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct SegmentWriter {
    folder: PathBuf,
    limits: DirectoryLimits,
    file: File,
    end: CommitMark,
    end_file: CommitFile,
    /// The newest ids; none until a record has one. Only some streams have such records, and of the
    /// others every segment would be read for nothing.
    ids: Option<RecentIds>,
    signal: Arc<AppendSignal>,
    /// Why appends fail until the stream is opened again.
    broken: Option<String>,
    /// Released last, because fields are dropped in order.
    _owner: DirLock,
}

impl SegmentWriter {
    /// Locks the stream for this process, and repairs what a crash left at its end.
    pub(super) fn open(
        topic: &Topic,
        folder: &Path,
        limits: DirectoryLimits,
        signal: Arc<AppendSignal>,
    ) -> Result<SegmentWriter> {
        atomic_dir::create(folder)?;
        let owner = lock(topic, folder)?;
        let MendedEnd { file, end, end_file } = mend_end(folder, limits)?;
        let folder = folder.to_path_buf();
        Ok(SegmentWriter {
            folder,
            limits,
            file,
            end,
            end_file,
            ids: None,
            signal,
            broken: None,
            _owner: owner,
        })
    }

    /// The newest ids, if any of the records has one or one before had.
    fn known_ids(&mut self, jobs: &[AppendJob<Vec<u8>>]) -> Result<Option<&mut RecentIds>> {
        if self.ids.is_none() && jobs.iter().any(|job| has_ids(&job.records)) {
            self.ids = Some(recent_ids(&self.folder, &self.end, self.limits.remembered_ids)?);
        }
        Ok(self.ids.as_mut())
    }

    fn write(&mut self, group: &[u8], position: u64) -> Result<()> {
        if group.is_empty() {
            return Ok(());
        }
        if let Some(reason) = &self.broken {
            return Err(Error::data(&self.folder, reason.clone()));
        }
        if self.end.offset >= self.limits.segment_bytes {
            self.begin_segment()?;
        }
        let end = CommitMark { position, offset: self.end.offset + group.len() as u64, ..self.end };
        let path = segment::path(&self.folder, end.base);
        if let Err(error) = self.file.write_all_at(group, self.end.offset) {
            self.undo_write(&path, None);
            return Err(Error::io(path)(error));
        }
        let synced = if self.limits.fsync { self.file.sync_data() } else { Ok(()) };
        if let Err(error) = synced.and_then(|()| self.end_file.write(&end)) {
            // After any other failure the kernel may consider pages written that are not.
            let full = error.kind() == ErrorKind::StorageFull;
            self.undo_write(&path, (!full).then_some(&error));
            return Err(Error::io(path)(error));
        }
        self.end = end;
        Ok(())
    }

    /// Cuts off what a failed append wrote, so that later records do not follow it.
    fn undo_write(&mut self, path: &Path, failed: Option<&io::Error>) {
        let cut = self.file.set_len(self.end.offset);
        let reason = failed.or(cut.as_ref().err()).map(|error| {
            format!("{} failed ({error}); check the disk and restart this process", path.display())
        });
        self.broken = self.broken.take().or(reason);
    }

    fn begin_segment(&mut self) -> Result<()> {
        let base = self.end.position;
        let path = segment::path(&self.folder, base);
        let file = File::open_as(&path, OpenMode::Keep).map_err(Error::io(&path))?;
        // The file may exist from an attempt that failed; its content was never acknowledged.
        file.set_len(0).map_err(Error::io(&path))?;
        if self.limits.fsync {
            sync_dir(&self.folder).map_err(Error::io(&self.folder))?;
        }
        self.file = file;
        self.end = CommitMark { position: base, base, offset: 0 };
        self.delete_old_segments()
    }

    /// Deletes the oldest segments beyond the configured size, but never the newest full one.
    fn delete_old_segments(&self) -> Result<()> {
        if self.limits.retain_bytes == 0 {
            return Ok(());
        }
        let mut room = self.limits.retain_bytes.saturating_sub(self.limits.segment_bytes);
        let bases = segment::bases(&self.folder)?;
        let mut keep = true;
        let mut too_old = Vec::new();
        for (age, &base) in bases.iter().rev().skip(1).enumerate() {
            let path = segment::path(&self.folder, base);
            let bytes = disk::metadata(&path).map_or(0, |of| of.length);
            keep &= age == 0 || bytes <= room;
            room = room.saturating_sub(bytes);
            if !keep {
                too_old.push(base);
            }
        }
        segment::remove(&self.folder, too_old.into_iter().rev())
    }
}

impl CommitSink for SegmentWriter {
    /// Encoded records, one after another.
    type Records = Vec<u8>;

    fn prepare(records: &[Record], with_ids: bool) -> Vec<u8> {
        let bytes = records.iter().map(|record| segment::HEADER + record.payload.len()).sum();
        let mut encoded = Vec::with_capacity(bytes);
        for record in records {
            // The next process reads the ids of the segments, so an id that does not count is 0.
            let id = if with_ids { record.id } else { 0 };
            segment::encode(id, &record.payload, &mut encoded);
        }
        encoded
    }

    fn bytes(records: &Vec<u8>) -> usize {
        records.len()
    }

    /// Appends the jobs in order with one write and one sync: all or none.
    fn commit(&mut self, jobs: &[AppendJob<Vec<u8>>]) -> Result<Vec<CommitOutcome>> {
        let mut end = self.end.position;
        let mut ids = self.known_ids(jobs)?;
        let known = ids.as_ref().map_or(0, |ids| ids.len());
        let mut group = Vec::with_capacity(jobs.iter().map(|job| job.records.len()).sum());
        let mut outcomes = Vec::with_capacity(jobs.len());
        for job in jobs {
            if job.expected_end.is_some_and(|expected| expected != end) {
                outcomes.push(None);
                continue;
            }
            let mut repeated = 0;
            let mut rest = &job.records[..];
            while !rest.is_empty() {
                let (length, id) = segment::measure(rest);
                let (record, behind) = rest.split_at(length);
                rest = behind;
                let is_counted = job.expected_end.is_none();
                if is_counted && ids.as_mut().is_some_and(|ids| !ids.admit(id)) {
                    repeated += 1;
                    continue;
                }
                let back = group.len();
                group.extend_from_slice(record);
                segment::seal(&mut group[back..], back);
                end += 1;
            }
            outcomes.push(Some(Appended { end, repeated }));
        }
        match self.write(&group, end) {
            Ok(()) => {
                self.ids.iter_mut().for_each(RecentIds::settle);
                self.signal.notify();
                Ok(outcomes)
            }
            Err(error) => {
                self.ids.iter_mut().for_each(|ids| ids.undo(known));
                Err(error)
            }
        }
    }
}

/// Whether any of these encoded records has an id.
fn has_ids(mut records: &[u8]) -> bool {
    while !records.is_empty() {
        let (length, id) = segment::measure(records);
        if id != 0 {
            return true;
        }
        records = &records[length..];
    }
    false
}

/// Makes the file `end` say what the segments have, if it lags behind. Without that a process that
/// reads first after a power cut would find the stream shorter than what was acknowledged. Does
/// nothing while a writer has the stream, which did this when it opened it, or where this process
/// may not write.
pub(super) fn correct_end(folder: &Path, limits: DirectoryLimits) -> Result<()> {
    let Some(&base) = segment::bases(folder)?.last() else { return Ok(()) };
    let stored = disk::metadata(&segment::path(folder, base)).map_or(0, |of| of.length);
    // Records that it has beyond the segments are damage, which a reader meets where it begins.
    let lags = |end: CommitMark| end.base < base || end.base == base && end.offset < stored;
    if !CommitMark::read(folder)?.is_none_or(lags) {
        return Ok(());
    }
    match DirLock::try_acquire(&folder.join("owner"), Duration::ZERO) {
        Ok(Ok(_owner)) => mend_end(folder, limits).map(drop),
        Ok(Err(_writer)) => Ok(()),
        Err(hypercast_core::Error::Io { source, .. })
            if matches!(
                source.kind(),
                ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// The end of a stream, as its segments and the file `end` have it.
struct MendedEnd {
    /// The last segment.
    file: File,
    end: CommitMark,
    end_file: CommitFile,
}

/// Repairs what a crash left at the end of a stream that this process has locked.
fn mend_end(folder: &Path, limits: DirectoryLimits) -> Result<MendedEnd> {
    let bases = segment::bases(folder)?;
    let believed = CommitMark::read(folder)?;
    let base = bases.last().copied().unwrap_or(0);
    let path = segment::path(folder, base);
    if let Some(end) = believed.filter(|end| end.base > base || bases.is_empty()) {
        let lost = segment::path(folder, end.base);
        return Err(Error::data(lost, "this segment is missing; restore it from a copy"));
    }
    let file = File::open_as(&path, OpenMode::Keep).map_err(Error::io(&path))?;
    let acknowledged = believed.filter(|end| end.base == base).map_or(0, |end| end.offset);
    let end = recover(&path, base, acknowledged, limits.fsync)?;
    let length = file.length().map_err(Error::io(&path))?;
    if end.offset < length {
        tracing::warn!(path = %path.display(), bytes = length - end.offset, "the stream ended with a torn record; it was never acknowledged and is cut off");
        file.set_len(end.offset).map_err(Error::io(&path))?;
    }
    if limits.fsync {
        file.sync_all().and_then(|()| sync_dir(folder)).map_err(Error::io(&path))?;
    }
    let end_file = CommitFile::create(folder, &end)?;
    Ok(MendedEnd { file, end, end_file })
}

/// The end of the sound records of the last segment.
fn recover(path: &Path, base: u64, acknowledged: u64, fsync: bool) -> Result<CommitMark> {
    let mut records = SegmentReader::open(path.to_path_buf()).map_err(Error::io(path))?;
    let SoundRecords { ids, torn } = records.read_ids(u64::MAX)?;
    let offset = records.offset;
    // Without syncs a power cut may lose acknowledged records; the user chose that.
    let lost = fsync && offset < acknowledged;
    if lost || (torn && segment::later_write_follows(path, offset)?) {
        return Err(records.damaged());
    }
    Ok(CommitMark { position: base + ids.len() as u64, base, offset })
}

/// The newest ids of a stream up to an end: those of its last segment and of as many segments
/// before as needed.
fn recent_ids(folder: &Path, end: &CommitMark, most: usize) -> Result<RecentIds> {
    // A record without an id, as a tick, takes no room of one that has one.
    let counted = |ids: &[u64]| ids.iter().filter(|&&id| id != 0).count();
    let (mut count, mut parts) = (0, Vec::new());
    for &base in segment::bases(folder)?.iter().rev() {
        if count >= most {
            break;
        }
        let path = segment::path(folder, base);
        let opened = Error::found(&path, SegmentReader::open(path.clone()))?;
        // Or just deleted by another process.
        let Some(mut records) = opened else { break };
        let SoundRecords { ids, torn } = records.read_ids(end.limit(base))?;
        if torn {
            return Err(records.damaged());
        }
        count += counted(&ids);
        parts.push(ids);
    }
    let mut ids = RecentIds::new(most);
    for id in parts.into_iter().rev().flatten() {
        ids.admit(id);
        ids.settle();
    }
    Ok(ids)
}

/// Locks a stream for writing, or names the process that has it. That is no failure of the disk,
/// and some processes write for a moment only, so it is worth trying again.
fn lock(topic: &Topic, folder: &Path) -> Result<DirLock> {
    let path = folder.join("owner");
    DirLock::try_acquire(&path, LOCK_WAIT)?.map_err(|holder| {
        let folder = folder.display();
        Error::unreachable(format!(
            "{folder}: {holder} writes to the stream {topic}, and a stream has one writer; stop \
             it, or give this process another engine.dir"
        ))
    })
}
