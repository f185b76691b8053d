//! The directory engine: each stream is a directory of segment files, named by their first
//! position.
//!
//! Beside the segments are two files: `end` says how far records are durable ([`commit_mark`]), and
//! `owner` is the lock of the one writing process. Readers may be in any process of the same
//! machine; network file systems are not supported.

mod commit_mark;
mod reader;
mod segment;
mod segment_writer;
mod signal;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use hypercast_config::EngineSettings;
use hypercast_core::atomic_dir;
use hypercast_core::shutdown::Shutdown;

use self::commit_mark::CommitMark;
use self::reader::DirectoryReader;
use self::segment_writer::SegmentWriter;
use self::signal::AppendSignal;
use super::group_commit::GroupCommit;
use super::{Appender, Reader, StreamEngine, StreamPlace, Topic, locked};
use crate::error::{CommonErrors as _, Error, Result};

/// Streams in a directory of one machine.
#[derive(Debug)]
pub struct DirectoryEngine {
    dir: PathBuf,
    limits: DirectoryLimits,
    /// The writers of this process, while an appender is in use.
    appenders: Mutex<BTreeMap<Topic, Weak<GroupCommit<SegmentWriter>>>>,
    /// Wake the readers of this process when one of those writers appends.
    signals: Mutex<BTreeMap<Topic, Arc<AppendSignal>>>,
    /// Streams whose end this process has corrected if it had to be.
    corrected: Mutex<BTreeSet<Topic>>,
    stop: Shutdown,
}

/// How streams are stored: [`EngineSettings`] in bytes.
#[derive(Debug, Clone, Copy)]
pub struct DirectoryLimits {
    /// Whether an append waits for `fsync`.
    pub fsync: bool,
    /// The size at which the next segment begins.
    pub segment_bytes: u64,
    /// The size of a stream above which old segments are deleted; 0 keeps everything.
    pub retain_bytes: u64,
    /// The number of record ids that a stream remembers.
    pub remembered_ids: usize,
}

impl DirectoryEngine {
    /// Opens the directory and creates it if needed. `stop` is the engine's
    /// [`is_stopping`](StreamEngine::is_stopping).
    ///
    /// # Errors
    /// The directory cannot be created, or `engine.segment_mib` is 0.
    pub fn open(settings: &EngineSettings, stop: &Shutdown) -> Result<DirectoryEngine> {
        if settings.segment_mib == 0 {
            return Err(Error::invalid("engine.segment_mib is 0; it must be at least 1"));
        }
        let limits = DirectoryLimits {
            fsync: settings.fsync,
            segment_bytes: settings.segment_mib << 20,
            retain_bytes: settings.retain_mib << 20,
            remembered_ids: settings.remembered_ids,
        };
        let engine = DirectoryEngine::with(&settings.dir, limits)?;
        Ok(DirectoryEngine { stop: stop.clone(), ..engine })
    }

    /// Opens the directory with limits that settings, in MiB, cannot say: those of a simulation are
    /// so small that it meets them often.
    ///
    /// # Errors
    /// The directory cannot be created.
    pub fn with(dir: &Path, limits: DirectoryLimits) -> Result<DirectoryEngine> {
        atomic_dir::create(dir)?;
        Ok(DirectoryEngine {
            dir: dir.to_path_buf(),
            limits,
            appenders: Mutex::default(),
            signals: Mutex::default(),
            corrected: Mutex::default(),
            stop: Shutdown::default(),
        })
    }

    fn folder(&self, topic: &Topic) -> PathBuf {
        self.dir.join(topic.name())
    }

    /// The folder of a stream, for readers: its end is right.
    fn readable(&self, topic: &Topic) -> Result<PathBuf> {
        let folder = self.folder(topic);
        if !locked(&self.corrected).contains(topic) {
            segment_writer::correct_end(&folder, self.limits)?;
            locked(&self.corrected).insert(topic.clone());
        }
        Ok(folder)
    }

    fn signal(&self, topic: &Topic) -> Arc<AppendSignal> {
        locked(&self.signals).entry(topic.clone()).or_default().clone()
    }
}

impl StreamEngine for DirectoryEngine {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        let mut appenders = locked(&self.appenders);
        if let Some(appender) = appenders.get(topic).and_then(Weak::upgrade) {
            return Ok(appender);
        }
        let writer =
            SegmentWriter::open(topic, &self.folder(topic), self.limits, self.signal(topic))?;
        let appender = Arc::new(GroupCommit::new(topic, writer));
        appenders.insert(topic.clone(), Arc::downgrade(&appender));
        Ok(appender)
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        let folder = self.readable(topic)?;
        Ok(Box::new(DirectoryReader::new(topic, &folder, place, self.signal(topic))))
    }

    fn span(&self, topic: &Topic) -> Result<Range<u64>> {
        let folder = self.readable(topic)?;
        let Some(end) = CommitMark::read(&folder)? else { return Ok(0..0) };
        let first = segment::bases(&folder)?.first().copied().unwrap_or(end.position);
        Ok(first.min(end.position)..end.position)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        let folder = self.folder(topic);
        // A segment is deleted if the next one begins early enough. The last one, which is written
        // to, never is.
        let bases = segment::bases(&folder)?;
        let too_old = bases.windows(2).take_while(|pair| pair[1] <= before).map(|pair| pair[0]);
        segment::remove(&folder, too_old)
    }

    fn is_stopping(&self) -> bool {
        self.stop.is_requested()
    }
}
