//! How far a stream's records are durable: the file `end`, rewritten in place
//! after each sync.
//!
//! Readers go by it alone, so they never see what an append that fails takes back, nor the torn tail of one that
//! was killed. It is not synced itself: after a power cut it may be behind, and the next writer puts it right.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::error::{CommonErrors as _, Error, Result};

const BYTES: usize = 28;

/// Where a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// The position after the last record.
    pub(super) position: u64,
    /// The first position of the segment that it is in.
    pub(super) base: u64,
    /// Bytes of that segment.
    pub(super) offset: u64,
}

impl End {
    /// The stream's end; none where nothing was ever appended.
    pub(super) fn read(folder: &Path) -> Result<Option<End>> {
        EndFile::open(folder)?.map_or(Ok(None), |file| file.read())
    }

    /// How much of a segment counts; a sealed one does as far as its file goes.
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

    fn decode(bytes: &[u8; BYTES]) -> Option<End> {
        let mut values = bytes
            .chunks_exact(8)
            .map(|eight| u64::from_le_bytes(eight.try_into().expect("chunks of eight bytes")));
        let end = End { position: values.next()?, base: values.next()?, offset: values.next()? };
        (end.encode() == *bytes).then_some(end)
    }
}

/// The file, open for reading or writing.
#[derive(Debug)]
pub(super) struct EndFile {
    path: PathBuf,
    file: File,
}

impl EndFile {
    /// For reading; none where it is not there yet.
    pub(super) fn open(folder: &Path) -> Result<Option<EndFile>> {
        let path = folder.join("end");
        match File::open(&path) {
            Ok(file) => Ok(Some(EndFile { path, file })),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io(path)(error)),
        }
    }

    /// For the writer, who makes it if need be.
    pub(super) fn create(folder: &Path) -> Result<EndFile> {
        let path = folder.join("end");
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).map_err(Error::io(&path))?;
        Ok(EndFile { path, file })
    }

    pub(super) fn write(&self, end: &End) -> std::io::Result<()> {
        self.file.write_all_at(&end.encode(), 0)
    }

    /// What it says; none while it is empty.
    pub(super) fn read(&self) -> Result<Option<End>> {
        // A look amid a write may see parts of two ends; the next one does not.
        for _ in 0..100 {
            let mut bytes = [0; BYTES];
            let read = self.file.read_at(&mut bytes, 0).map_err(Error::io(&self.path))?;
            match End::decode(&bytes) {
                _ if read == 0 => return Ok(None),
                Some(end) => return Ok(Some(end)),
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
        Err(Error::data(
            &self.path,
            "is damaged: stop the stream's writer and remove this file; the writer makes it again from the segments",
        ))
    }
}
