//! Segments: files of records, one after another, named by the first position.
//!
//! A record is `length u32, crc32 u32, id u64, back u32, payload`, little endian. `back` is the bytes
//! from the beginning of the write that it came with, so that after a crash one can tell what
//! was written together. The checksum is of everything but itself.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::engine::MAX_RECORD_BYTES;
use crate::error::{CommonErrors as _, Error, Result};

/// Bytes before a payload.
pub(super) const HEADER: usize = 20;

/// Bytes read at once.
const CHUNK: u64 = 256 << 10;

pub(super) fn path(folder: &Path, base: u64) -> PathBuf {
    folder.join(format!("{base:020}.records"))
}

/// The first positions of a folder's segments, in order; none where the folder is not there.
pub(super) fn bases(folder: &Path) -> Result<Vec<u64>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut bases = Vec::new();
    for entry in entries {
        let name = entry.map_err(Error::io(folder))?.file_name();
        let base = name.to_str().and_then(|name| name.strip_suffix(".records"));
        bases.extend(base.and_then(|base| base.parse::<u64>().ok()));
    }
    bases.sort_unstable();
    Ok(bases)
}

/// Puts a record behind others, without its checksum, which [`seal`] adds.
pub(super) fn encode(id: u64, payload: &[u8], into: &mut Vec<u8>) {
    into.extend((payload.len() as u32).to_le_bytes());
    into.extend([0; 4]);
    into.extend(id.to_le_bytes());
    into.extend([0; 4]);
    into.extend(payload);
}

/// Says how far behind the beginning of its write a record is, and makes its checksum.
pub(super) fn seal(record: &mut [u8], back: usize) {
    record[16..HEADER].copy_from_slice(&(back as u32).to_le_bytes());
    let crc = checksum(record);
    record[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// The whole length of the record that these bytes begin with, and its id.
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

/// The record that these bytes begin with, if there is a sound one.
fn sound(bytes: &[u8]) -> Option<&[u8]> {
    let header = bytes.get(..HEADER)?;
    let (length, _) = measure(header);
    let record = bytes.get(..length).filter(|_| length <= HEADER + MAX_RECORD_BYTES)?;
    (checksum(record) == word(record, 4)).then_some(record)
}

/// What a segment has next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    Record {
        id: u64,
        payload: &'a [u8],
    },
    /// Nothing: the limit, or the end of the file.
    End,
    /// Something that is no sound record.
    Bad,
}

/// A segment's records in order.
#[derive(Debug)]
pub(super) struct Records {
    file: File,
    path: PathBuf,
    /// Where in the file the next record begins.
    offset: u64,
    /// What was read of the file from `offset` on, behind `start`.
    buffer: Vec<u8>,
    start: usize,
}

impl Records {
    pub(super) fn open(path: PathBuf) -> std::io::Result<Records> {
        let file = File::open(&path)?;
        Ok(Records { file, path, offset: 0, buffer: Vec::new(), start: 0 })
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next record before a limit in bytes.
    pub(super) fn next(&mut self, limit: u64) -> Result<Next<'_>> {
        if self.fill(HEADER, limit)? == 0 {
            return Ok(Next::End);
        }
        if self.buffer.len() - self.start < HEADER {
            return Ok(Next::Bad);
        }
        let (length, id) = measure(&self.buffer[self.start..]);
        if length > HEADER + MAX_RECORD_BYTES || self.fill(length, limit)? < length {
            return Ok(Next::Bad);
        }
        let at = self.start;
        let Some(record) = sound(&self.buffer[at..]) else { return Ok(Next::Bad) };
        self.start += record.len();
        self.offset += record.len() as u64;
        Ok(Next::Record { id, payload: &self.buffer[at + HEADER..at + length] })
    }

    /// The error of a record that is not sound although it must be.
    pub(super) fn damaged(&self) -> Error {
        damaged(&self.path, self.offset)
    }

    /// Reads until at least so many bytes are there, or the limit or the end of the file; how many are there.
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

/// The error of damage that lost what was kept.
pub(super) fn damaged(path: &Path, offset: u64) -> Error {
    let folder = path.parent().unwrap_or(path);
    Error::data(
        path,
        format!(
            "the record at byte {offset} is damaged or cut off although it was acknowledged; restore the file from a copy, or, \
             to go on without that record and all after it, stop the stream's writer, cut the file with `truncate -s {offset}` \
             and remove {} and all later segments",
            folder.join("end").display()
        ),
    )
}

/// Whether behind the damage at `offset` there is a sound record of a later write: one that was begun after what
/// is damaged had been acknowledged.
pub(super) fn later_write_follows(path: &Path, offset: u64) -> Result<bool> {
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let tail = bytes.get(offset as usize..).unwrap_or_default();
    Ok((1..tail.len())
        .any(|at| sound(&tail[at..]).is_some_and(|record| (word(record, 16) as usize) < at)))
}
