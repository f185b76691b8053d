//! Segments: files of consecutive records, named by the position of the first.
//!
//! A record is `length u32, crc32 u32, id u64, back u32, payload`, little endian. `back` is the
//! distance in bytes to the beginning of the write that the record was part of; after a crash it
//! tells which records were written together. The checksum covers everything but itself.

use std::path::{Path, PathBuf};

use hypercast_core::disk::{self, File};

use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::MAX_RECORD_BYTES;

/// Bytes of a record before its payload.
pub(super) const HEADER: usize = 20;

/// Bytes per read of a file.
const CHUNK: u64 = 256 << 10;

pub(super) fn path(folder: &Path, base: u64) -> PathBuf {
    folder.join(format!("{base:020}.records"))
}

/// The first positions of a directory's segments, in order; empty if there is no directory.
pub(super) fn bases(folder: &Path) -> Result<Vec<u64>> {
    let names = Error::found(folder, disk::names(folder))?.unwrap_or_default();
    let base = |name: &std::ffi::OsString| {
        name.to_str().and_then(|name| name.strip_suffix(".records")?.parse().ok())
    };
    let mut bases: Vec<u64> = names.iter().filter_map(base).collect();
    bases.sort_unstable();
    Ok(bases)
}

/// Removes the segments that begin at these positions, the oldest first, and each durably before
/// the next: those that a crash leaves still follow each other. Another process may have removed
/// one already.
pub(super) fn remove(folder: &Path, bases: impl Iterator<Item = u64>) -> Result<()> {
    for base in bases {
        let path = path(folder, base);
        if Error::found(&path, disk::remove_file(&path))?.is_some() {
            disk::sync_dir(folder).map_err(Error::io(folder))?;
        }
    }
    Ok(())
}

/// Appends a record to `into`, without `back` and the checksum, which [`seal`] adds.
pub(super) fn encode(id: u64, payload: &[u8], into: &mut Vec<u8>) {
    into.extend((payload.len() as u32).to_le_bytes());
    into.extend([0; 4]);
    into.extend(id.to_le_bytes());
    into.extend([0; 4]);
    into.extend(payload);
}

/// Sets a record's distance to the beginning of its write, and its checksum.
pub(super) fn seal(record: &mut [u8], back: usize) {
    record[16..HEADER].copy_from_slice(&(back as u32).to_le_bytes());
    let crc = checksum(record);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// The length of the record at the beginning of `bytes`, header included, and its id.
pub(super) fn measure(bytes: &[u8]) -> (usize, u64) {
    let id = bytes[8..16].try_into().expect("eight bytes");
    (HEADER + word(bytes, 0) as usize, u64::from_le_bytes(id))
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn checksum(record: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..4]);
    hasher.update(&record[8..]);
    hasher.finalize()
}

/// The record at the beginning of `bytes`, if it is complete and its checksum is right.
fn sound(bytes: &[u8]) -> Option<&[u8]> {
    let header = bytes.get(..HEADER)?;
    let (length, _) = measure(header);
    let record = bytes.get(..length).filter(|_| length <= HEADER + MAX_RECORD_BYTES)?;
    (checksum(record) == word(record, 4)).then_some(record)
}

/// The next item of a segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum SegmentItem<'a> {
    Record {
        id: u64,
        payload: &'a [u8],
    },
    /// The limit or the end of the file.
    End,
    /// An incomplete or damaged record.
    Bad,
}

/// The sound records at the beginning of a segment.
pub(super) struct SoundRecords {
    pub(super) ids: Vec<u64>,
    /// Whether a damaged or incomplete record follows.
    pub(super) torn: bool,
}

/// Reads a segment's records in order.
#[derive(Debug)]
pub(super) struct SegmentReader {
    file: File,
    path: PathBuf,
    /// The offset of the next record in the file.
    pub(super) offset: u64,
    /// Bytes of the file; those from `start` on begin at `offset`.
    buffer: Vec<u8>,
    start: usize,
}

impl SegmentReader {
    pub(super) fn open(path: PathBuf) -> std::io::Result<SegmentReader> {
        let file = File::open(&path)?;
        Ok(SegmentReader { file, path, offset: 0, buffer: Vec::new(), start: 0 })
    }

    /// The next record that ends before `limit` bytes.
    pub(super) fn next(&mut self, limit: u64) -> Result<SegmentItem<'_>> {
        if self.fill(HEADER, limit)? == 0 {
            return Ok(SegmentItem::End);
        }
        if self.buffer.len() - self.start < HEADER {
            return Ok(SegmentItem::Bad);
        }
        let (length, id) = measure(&self.buffer[self.start..]);
        if length > HEADER + MAX_RECORD_BYTES || self.fill(length, limit)? < length {
            return Ok(SegmentItem::Bad);
        }
        let at = self.start;
        let Some(record) = sound(&self.buffer[at..]) else { return Ok(SegmentItem::Bad) };
        self.start += record.len();
        self.offset += record.len() as u64;
        Ok(SegmentItem::Record { id, payload: &self.buffer[at + HEADER..at + length] })
    }

    /// Reads the ids of all further records, up to `limit` bytes, the end or the first damaged
    /// record.
    pub(super) fn read_ids(&mut self, limit: u64) -> Result<SoundRecords> {
        let mut ids = Vec::new();
        loop {
            match self.next(limit)? {
                SegmentItem::Record { id, .. } => ids.push(id),
                SegmentItem::End => return Ok(SoundRecords { ids, torn: false }),
                SegmentItem::Bad => return Ok(SoundRecords { ids, torn: true }),
            }
        }
    }

    /// The error for a damaged record that was acknowledged.
    pub(super) fn damaged(&self) -> Error {
        let offset = self.offset;
        let folder = self.path.parent().unwrap_or(&self.path);
        Error::data(
            &self.path,
            format!(
                "the record at byte {offset} is damaged or cut off although it was acknowledged; \
                 restore the file from a copy, or, to continue without this record and all later \
                 ones, stop the stream's writer, cut the file with `truncate -s {offset}`, and remove \
                 {} and all later segments",
                folder.join("end").display()
            ),
        )
    }

    /// Reads until at least `want` bytes are buffered, or the limit or the end of the file is
    /// reached. Returns the number of buffered bytes.
    fn fill(&mut self, want: usize, limit: u64) -> Result<usize> {
        loop {
            let have = self.buffer.len() - self.start;
            let at = self.offset + have as u64;
            let missing =
                (want.saturating_sub(have) as u64).max(CHUNK).min(limit.saturating_sub(at));
            if have >= want || missing == 0 {
                return Ok(have);
            }
            self.buffer.drain(..self.start);
            self.start = 0;
            self.buffer.resize(have + missing as usize, 0);
            let read =
                self.file.read_at(&mut self.buffer[have..], at).map_err(Error::io(&self.path))?;
            self.buffer.truncate(have + read);
            if read == 0 {
                return Ok(have);
            }
        }
    }
}

/// The position after the last sound record of a stream's segments; 0 if there are none.
pub(super) fn stored_end(folder: &Path) -> Result<u64> {
    let Some(&base) = bases(folder)?.last() else { return Ok(0) };
    let path = path(folder, base);
    let Some(mut records) = Error::found(&path, SegmentReader::open(path.clone()))? else {
        return Ok(base);
    };
    Ok(base + records.read_ids(u64::MAX)?.ids.len() as u64)
}

/// Whether after the damage at `offset` there is a sound record of a later write. That write began
/// after the damaged record had been acknowledged, so the damage is not a torn last write.
pub(super) fn later_write_follows(path: &Path, offset: u64) -> Result<bool> {
    let bytes = disk::read(path).map_err(Error::io(path))?;
    let tail = bytes.get(offset as usize..).unwrap_or_default();
    Ok((1..tail.len())
        .any(|at| sound(&tail[at..]).is_some_and(|record| (word(record, 16) as usize) < at)))
}
