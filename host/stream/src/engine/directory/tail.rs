//! The end of a stream as its writer has it: writes groups of appends, syncs
//! them, begins segments and lets old ones go. One thread at a time has it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::end::{End, EndFile};
use super::segment::{self, Next, Records};
use super::{Limits, remove};
use crate::engine::Appended;
use crate::engine::ids::Ids;
use crate::engine::line::{Outcome, Sink};
use crate::error::{CommonErrors as _, Error, Result};

/// One call's records.
#[derive(Debug)]
pub(super) struct Job {
    /// Where the stream must end; none to append wherever it does, and to pass over ids that are known.
    pub(super) at: Option<u64>,
    /// Encoded records, one after another.
    pub(super) records: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Tail {
    folder: PathBuf,
    limits: Limits,
    file: File,
    end: End,
    end_file: EndFile,
    ids: Ids,
    /// Why nothing can be appended until the stream is opened again.
    broken: Option<String>,
}

impl Tail {
    /// Opens the tail of a stream that the caller owns, and puts right what a crash left.
    pub(super) fn open(folder: &Path, limits: Limits) -> Result<Tail> {
        let bases = segment::bases(folder)?;
        let believed = End::read(folder)?;
        let base = bases.last().copied().unwrap_or(0);
        let path = segment::path(folder, base);
        if let Some(end) = believed.filter(|end| end.base > base || bases.is_empty()) {
            let lost = segment::path(folder, end.base);
            return Err(Error::data(lost, "this segment is missing; restore it from a copy"));
        }
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(Error::io(&path))?;
        let acknowledged = believed.filter(|end| end.base == base).map_or(0, |end| end.offset);
        let (end, newest) = recover(&path, base, acknowledged, limits.fsync)?;
        let length = file.metadata().map_err(Error::io(&path))?.len();
        if end.offset < length {
            tracing::warn!(path = %path.display(), bytes = length - end.offset, "cut the torn tail of a stream, which was never acknowledged");
            file.set_len(end.offset).map_err(Error::io(&path))?;
        }
        if limits.fsync {
            file.sync_all().and_then(|()| sync_folder(folder)).map_err(Error::io(&path))?;
        }
        let ids = remember(folder, &bases, newest, limits.remembered_ids)?;
        let end_file = EndFile::create(folder)?;
        end_file.write(&end).map_err(Error::io(folder.join("end")))?;
        let folder = folder.to_path_buf();
        Ok(Tail { folder, limits, file, end, end_file, ids, broken: None })
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
        let end = End { position, offset: self.end.offset + group.len() as u64, ..self.end };
        let path = segment::path(&self.folder, end.base);
        if let Err(error) = self.file.write_all_at(group, self.end.offset) {
            self.take_back(&path, None);
            return Err(Error::io(path)(error));
        }
        let synced = if self.limits.fsync { self.file.sync_data() } else { Ok(()) };
        if let Err(error) = synced.and_then(|()| self.end_file.write(&end)) {
            // After any other failure the system may hold pages for written that are not.
            let full = error.kind() == ErrorKind::StorageFull;
            self.take_back(&path, (!full).then_some(&error));
            return Err(Error::io(path)(error));
        }
        self.end = end;
        Ok(())
    }

    /// Cuts off what a failed append wrote, so that it does not come to lie before what later ones write.
    fn take_back(&mut self, path: &Path, failed: Option<&io::Error>) {
        let cut = self.file.set_len(self.end.offset);
        let reason = failed.or(cut.as_ref().err()).map(|error| {
            format!(
                "{} failed ({error}); check the disk and start this process again",
                path.display()
            )
        });
        self.broken = self.broken.take().or(reason);
    }

    fn begin_segment(&mut self) -> Result<()> {
        let base = self.end.position;
        let path = segment::path(&self.folder, base);
        let mut options = OpenOptions::new();
        // What such a file holds, from an attempt that failed, was never acknowledged.
        let options = options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).map_err(Error::io(&path))?;
        if self.limits.fsync {
            sync_folder(&self.folder).map_err(Error::io(&self.folder))?;
        }
        self.file = file;
        self.end = End { position: base, base, offset: 0 };
        self.let_go()
    }

    /// Removes the oldest segments beyond what is to be kept, but never the newest that is full.
    fn let_go(&self) -> Result<()> {
        if self.limits.retain_bytes == 0 {
            return Ok(());
        }
        let mut room = self.limits.retain_bytes.saturating_sub(self.limits.segment_bytes);
        let bases = segment::bases(&self.folder)?;
        let mut keep = true;
        for (age, &base) in bases.iter().rev().skip(1).enumerate() {
            let path = segment::path(&self.folder, base);
            let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
            keep &= age == 0 || bytes <= room;
            room = room.saturating_sub(bytes);
            if !keep {
                remove(&path)?;
            }
        }
        Ok(())
    }
}

impl Sink for Tail {
    type Job = Job;

    fn bytes(job: &Job) -> usize {
        job.records.len()
    }

    /// Appends the jobs in order with one write and one sync: all of them, or none.
    fn commit(&mut self, jobs: &[Job]) -> Result<Vec<Outcome>> {
        let known = self.ids.len();
        let mut group = Vec::with_capacity(jobs.iter().map(|job| job.records.len()).sum());
        let mut end = self.end.position;
        let mut outcomes = Vec::with_capacity(jobs.len());
        for job in jobs {
            if job.at.is_some_and(|at| at != end) {
                outcomes.push(None);
                continue;
            }
            let mut repeated = 0;
            let mut rest = &job.records[..];
            while !rest.is_empty() {
                let (length, id) = segment::measure(rest);
                let (record, behind) = rest.split_at(length);
                rest = behind;
                if job.at.is_none() && !self.ids.admit(id) {
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
                self.ids.settle();
                Ok(outcomes)
            }
            Err(error) => {
                self.ids.undo(known);
                Err(error)
            }
        }
    }
}

/// Where the sound records of the last segment end, and their ids.
fn recover(path: &Path, base: u64, acknowledged: u64, fsync: bool) -> Result<(End, Vec<u64>)> {
    let mut records = Records::open(path.to_path_buf()).map_err(Error::io(path))?;
    let mut ids = Vec::new();
    let torn = loop {
        match records.next(u64::MAX)? {
            Next::Record { id, .. } => ids.push(id),
            Next::End => break false,
            Next::Bad => break true,
        }
    };
    let offset = records.offset();
    // Without syncs a power cut may take what was acknowledged, and that is what was chosen.
    let lost = fsync && offset < acknowledged;
    if lost || (torn && segment::later_write_follows(path, offset)?) {
        return Err(segment::damaged(path, offset));
    }
    Ok((End { position: base + ids.len() as u64, base, offset }, ids))
}

/// The newest ids of a stream: those of its last segment, and of as many before it as it takes.
fn remember(folder: &Path, bases: &[u64], newest: Vec<u64>, most: usize) -> Result<Ids> {
    let mut count = newest.len();
    let mut parts = vec![newest];
    for &base in bases.iter().rev().skip(1) {
        if count >= most {
            break;
        }
        let mut records = match Records::open(segment::path(folder, base)) {
            // Trimmed by another process just now.
            Err(error) if error.kind() == ErrorKind::NotFound => break,
            opened => opened.map_err(Error::io(segment::path(folder, base)))?,
        };
        let mut ids = Vec::new();
        loop {
            match records.next(u64::MAX)? {
                Next::Record { id, .. } => ids.push(id),
                Next::End => break,
                Next::Bad => return Err(records.damaged()),
            }
        }
        count += ids.len();
        parts.push(ids);
    }
    let mut ids = Ids::new(most);
    for id in parts.into_iter().rev().flatten() {
        ids.admit(id);
        ids.settle();
    }
    Ok(ids)
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}
