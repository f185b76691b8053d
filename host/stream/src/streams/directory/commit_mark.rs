//! The file `end` says how far a stream's records are durable. The writer rewrites it in place
//! after each sync.
//!
//! Readers trust only this file, so they never see records that a failed append removes again, nor
//! the torn last record of a writer that was killed. Once it exists, the file itself is not synced:
//! after a power cut it may lag behind, and the next process that writes or reads corrects it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hypercast_core::atomic_file;
use hypercast_core::clock;
use hypercast_core::disk::{self, File, OpenMode};

use crate::error::{CommonErrors as _, Error, Result};

const BYTES: usize = 28;

/// The end of the durable records of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CommitMark {
    /// The position after the last record.
    pub(super) position: u64,
    /// The first position of the segment that contains the end.
    pub(super) base: u64,
    /// The length of that segment in bytes.
    pub(super) offset: u64,
}

impl CommitMark {
    /// Reads a stream's end; `None` if nothing was ever appended.
    pub(super) fn read(folder: &Path) -> Result<Option<CommitMark>> {
        CommitFile::open(folder)?.map_or(Ok(None), |file| file.read())
    }

    /// The number of bytes of a segment that are durable; `u64::MAX` for a segment before the last
    /// one, whose whole file is.
    pub(super) fn limit(&self, base: u64) -> u64 {
        match base.cmp(&self.base) {
            std::cmp::Ordering::Less => u64::MAX,
            std::cmp::Ordering::Equal => self.offset,
            std::cmp::Ordering::Greater => 0,
        }
    }

    fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        for (to, value) in bytes.chunks_exact_mut(8).zip([self.position, self.base, self.offset]) {
            to.copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; BYTES]) -> Option<CommitMark> {
        let mut values = bytes.as_chunks().0.iter().map(|&eight| u64::from_le_bytes(eight));
        let end =
            CommitMark { position: values.next()?, base: values.next()?, offset: values.next()? };
        (end.encode() == *bytes).then_some(end)
    }
}

/// The file `end`, open for reading or writing.
#[derive(Debug)]
pub(super) struct CommitFile {
    path: PathBuf,
    file: File,
}

impl CommitFile {
    /// Opens the file for reading; `None` if it does not exist yet.
    pub(super) fn open(folder: &Path) -> Result<Option<CommitFile>> {
        let path = folder.join("end");
        Ok(Error::found(&path, File::open(&path))?.map(|file| CommitFile { path, file }))
    }

    /// Opens the file for the writer with the stream's end. A new one is durable at once with this
    /// content: after a power cut a file that was only written in place could be there empty, half
    /// or not at all, and the stream could not be opened.
    pub(super) fn create(folder: &Path, end: &CommitMark) -> Result<CommitFile> {
        let path = folder.join("end");
        let create = || {
            if !disk::exists(&path) {
                atomic_file::write(&path, &end.encode())?;
            }
            File::open_as(&path, OpenMode::Keep)
        };
        let file = create().map_err(Error::io(&path))?;
        let created = CommitFile { path, file };
        created.write(end).map_err(Error::io(&created.path))?;
        Ok(created)
    }

    pub(super) fn write(&self, end: &CommitMark) -> std::io::Result<()> {
        self.file.write_all_at(&end.encode(), 0)
    }

    /// Reads the end; `None` while the file is empty.
    pub(super) fn read(&self) -> Result<Option<CommitMark>> {
        // A read during a write may see parts of two values; the next read does not.
        for _ in 0..100 {
            let mut bytes = [0; BYTES];
            let read = self.file.read_at(&mut bytes, 0).map_err(Error::io(&self.path))?;
            match CommitMark::decode(&bytes) {
                _ if read == 0 => return Ok(None),
                Some(end) => return Ok(Some(end)),
                None => clock::sleep(Duration::from_millis(1)),
            }
        }
        Err(Error::data(
            &self.path,
            "the file is damaged; stop the stream's writer and remove this file: the next writer rebuilds it from the segments",
        ))
    }
}
