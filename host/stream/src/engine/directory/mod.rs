//! The engine in a directory: a folder a stream, in it segment files of
//! records, named by their first position.
//!
//! Beside the segments lie `end`, how far records are durable, which is all that
//! readers believe ([`end`]), and `owner`, the lock of the one writer ([`owner`]).
//! Readers may be of any process. It is for the processes of one machine: no network file systems.

mod appender;
mod end;
mod owner;
mod reader;
mod segment;
mod tail;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use self::appender::DirectoryAppender;
use self::end::End;
use self::reader::DirectoryReader;
use super::{Appender, Engine, Reader, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::EngineSettings;

/// Streams in a directory.
#[derive(Debug)]
pub struct Directory {
    dir: PathBuf,
    limits: Limits,
    /// This process' writers, as long as somebody holds them.
    appenders: Mutex<BTreeMap<Topic, Weak<DirectoryAppender>>>,
}

/// How streams are kept; of [`EngineSettings`], in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Whether an append waits for the disk.
    pub(super) fsync: bool,
    /// The size at which a segment's successor is begun.
    pub(super) segment_bytes: u64,
    /// The most that a stream keeps; 0 keeps everything.
    pub(super) retain_bytes: u64,
    /// The newest ids that a stream remembers.
    pub(super) remembered_ids: usize,
}

impl Directory {
    /// Opens or makes the directory.
    ///
    /// # Errors
    /// A directory that cannot be made.
    pub fn open(settings: &EngineSettings) -> Result<Directory> {
        if settings.segment_mib == 0 {
            return Err(Error::invalid("engine.segment_mib is 0; it must be at least 1"));
        }
        let limits = Limits {
            fsync: settings.fsync,
            segment_bytes: settings.segment_mib << 20,
            retain_bytes: settings.retain_mib << 20,
            remembered_ids: settings.remembered_ids,
        };
        Directory::with(&settings.dir, limits)
    }

    pub(super) fn with(dir: &Path, limits: Limits) -> Result<Directory> {
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        Ok(Directory { dir: dir.to_path_buf(), limits, appenders: Mutex::default() })
    }

    fn folder(&self, topic: &Topic) -> PathBuf {
        self.dir.join(topic.name())
    }
}

impl Engine for Directory {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        let mut appenders = self.appenders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(appender) = appenders.get(topic).and_then(Weak::upgrade) {
            return Ok(appender);
        }
        let appender = DirectoryAppender::open(topic, &self.folder(topic), self.limits)?;
        let appender = Arc::new(appender);
        appenders.insert(topic.clone(), Arc::downgrade(&appender));
        Ok(appender)
    }

    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>> {
        Ok(Box::new(DirectoryReader::new(topic, &self.folder(topic), from)))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let folder = self.folder(topic);
        let Some(end) = End::read(&folder)? else { return Ok(0..0) };
        let first = segment::bases(&folder)?.first().copied().unwrap_or(end.position);
        Ok(first.min(end.position)..end.position)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        let folder = self.folder(topic);
        // A segment goes if its successor begins early enough; the last one, which is written to, never does.
        for pair in segment::bases(&folder)?.windows(2) {
            if pair[1] <= before {
                remove(&segment::path(&folder, pair[0]))?;
            }
        }
        Ok(())
    }
}

/// Removes a segment, which another process may have removed already.
fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(path)(error)),
        _ => Ok(()),
    }
}
