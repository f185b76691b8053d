//! Durable streams: they carry events, joined examples, published weights and version decisions
//! from one process to the next.
//!
//! A stream (a [`Topic`]) is a sequence of records with positions 0, 1, 2, ... A record is durable
//! before its append returns, and it never changes. Three engines implement [`StreamEngine`]: a
//! directory on one machine, NATS JetStream across machines, and memory within one process. No
//! engine knows what a record means.

mod cursor;
mod directory;
mod follow;
mod group_commit;
mod ids;
mod memory;
mod nats;
mod place;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    fmt,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hypercast_config::{EngineKind, EngineSettings};
use hypercast_core::shutdown::Shutdown;

use crate::error::{CommonErrors as _, Error, Result};

pub use self::cursor::{StreamCursor, StreamRead, record_at};
pub use self::directory::{DirectoryEngine, DirectoryLimits};
pub use self::follow::{GapHandling, StreamFollower};
pub use self::memory::MemoryEngine;
pub use self::nats::NatsEngine;
pub use self::place::{GapCause, StreamGap, StreamPlace, StreamTrail};

/// Opens the engine that the settings name, for a process that a signal ends at once.
///
/// # Errors
/// The directory cannot be created, or the server cannot be reached.
pub fn open(settings: &EngineSettings) -> Result<Arc<dyn StreamEngine>> {
    open_with_shutdown(settings, &Shutdown::default())
}

/// As [`open`], for a service that saves its state before it ends. From `stop` on the engine still
/// does what it is asked, but waits for nothing that does not come, and repeats nothing that fails.
///
/// # Errors
/// As [`open`].
pub fn open_with_shutdown(
    settings: &EngineSettings,
    stop: &Shutdown,
) -> Result<Arc<dyn StreamEngine>> {
    Ok(match settings.kind {
        EngineKind::Directory => Arc::new(DirectoryEngine::open(settings, stop)?),
        EngineKind::Nats => Arc::new(NatsEngine::open(settings, stop)?),
    })
}

/// The name of a stream: lower-case letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(String);

impl Topic {
    /// Impressions, actions, items and users as callers sent them ([`crate::events`]).
    pub fn events() -> Topic {
        Topic("events".into())
    }

    /// Joined examples and their corrections ([`crate::join`]), for FM trainers and the logging
    /// tier.
    pub fn joined() -> Topic {
        Topic("joined".into())
    }

    /// Outcomes without features ([`crate::join::OutcomeRecord`]); daemons update their features
    /// from it.
    pub fn outcomes() -> Topic {
        Topic("outcomes".into())
    }

    /// Decisions about versions ([`crate::registry`]).
    pub fn versions() -> Topic {
        Topic("versions".into())
    }

    /// Records that were set aside ([`crate::dead_letters`]).
    pub fn dead_letters() -> Topic {
        Topic("dead-letters".into())
    }

    /// The stream with a name, of those whose records can be set aside.
    pub(crate) fn source(name: &str) -> Option<Topic> {
        [Topic::events(), Topic::joined(), Topic::outcomes()]
            .into_iter()
            .find(|topic| topic.name() == name)
    }

    /// The published weights of an FM version ([`crate::publish`]).
    pub fn fm(version: &str) -> Topic {
        Topic(format!("fm-{}", topic_part(version)))
    }

    /// The published weights of a version of an expert.
    pub fn expert(name: &str, version: &str) -> Topic {
        Topic(format!("expert-{}-{}", topic_part(name), topic_part(version)))
    }

    /// The name, which is also the name of the directory or NATS subject.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Encodes a name for a topic: keeps lower-case letters and digits, writes a dot as `_` and any
/// other character as its code point, so that different names stay different.
fn topic_part(name: &str) -> String {
    let encoded = name.chars().map(|c| match c {
        'a'..='z' | '0'..='9' => c.to_string(),
        '.' => "_".into(),
        c => format!("-{:x}-", c as u32),
    });
    encoded.collect()
}

/// A record to append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The stream skips a record whose id it remembers, so that a repeated append changes nothing.
    /// A record with id 0 is always appended.
    pub id: u64,
    /// The content, at most [`MAX_RECORD_BYTES`].
    pub payload: Vec<u8>,
}

/// The longest record in bytes. NATS accepts 1 MiB by default, headers included.
pub const MAX_RECORD_BYTES: usize = 960 << 10;

/// A read ends with the record that reaches this many bytes.
const READ_BYTES: usize = 8 << 20;

/// Returns an error if a record is too long, before anything is appended.
fn check_lengths(topic: &Topic, records: &[Record]) -> Result<()> {
    match records.iter().position(|record| record.payload.len() > MAX_RECORD_BYTES) {
        None => Ok(()),
        Some(at) => Err(Error::invalid(format!(
            "stream {topic}: record {at} of {} has {} bytes; at most {MAX_RECORD_BYTES} fit; send less in one record",
            records.len(),
            records[at].payload.len()
        ))),
    }
}

/// A record read from a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamRecord {
    /// The position in the stream.
    pub position: u64,
    /// When it was stored by the clock of the engine's server, milliseconds since the epoch; none
    /// where the engine has no clock but that of the process that appended.
    pub stored_ms: Option<i64>,
    /// The content.
    pub payload: Vec<u8>,
}

/// The result of an append.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The position after the stream's last record.
    pub end: u64,
    /// Records that were skipped because their ids were known.
    pub repeated: usize,
}

/// A set of durable streams.
pub trait StreamEngine: Send + Sync {
    /// Opens a stream for writing and creates it if needed. In a directory a stream has one writing
    /// process, until the last copy of the appender is dropped; the same engine returns the same
    /// appender again.
    ///
    /// # Errors
    /// Another process writes to the stream (the error names its process id), or the engine cannot
    /// be reached.
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>>;

    /// Reads a stream from a place on. A stream that does not exist is empty.
    ///
    /// # Errors
    /// The engine cannot be reached.
    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>>;

    /// Reads a stream from a position on.
    ///
    /// # Errors
    /// As [`StreamEngine::resume`].
    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>> {
        self.resume(topic, StreamPlace::at(from))
    }

    /// [`Appender::append_at`] for a stream that several processes write to, as the registry's:
    /// this process is its writer for this call alone, and waits briefly for another writer to
    /// finish.
    ///
    /// # Errors
    /// As [`StreamEngine::appender`] and [`Appender::append_at`].
    fn append_at(&self, topic: &Topic, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.appender(topic)?.append_at(end, records)
    }

    /// The position of the first record that is still stored, and the position after the last one.
    ///
    /// # Errors
    /// The engine cannot be reached.
    fn span(&self, topic: &Topic) -> Result<Range<u64>>;

    /// Deletes records before a position. Engines delete whole segments, so some of these records
    /// may stay.
    ///
    /// # Errors
    /// The engine cannot be reached.
    fn trim(&self, topic: &Topic, before: u64) -> Result<()>;

    /// Whether several processes can write to a stream at the same time.
    fn has_many_writers(&self) -> bool {
        false
    }

    /// Whether the process is to stop, so that nobody waits for this engine any longer. An engine
    /// that nobody can stop says no.
    fn is_stopping(&self) -> bool {
        false
    }
}

/// Locks what is sound even after a panic of another holder.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to one stream. Threads may share an appender; calls that arrive together share a sync.
pub trait Appender: Send + Sync {
    /// [`Appender::append_at`] if there is an expected end, else [`Appender::append`], which always
    /// gives a result.
    ///
    /// # Errors
    /// As [`Appender::append`].
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<Option<Appended>>;

    /// Appends records in order; they are durable when it returns. A second record with the same id
    /// in one call is skipped, too.
    ///
    /// # Errors
    /// A record is too long: nothing is appended. The disk is full, or the engine cannot be
    /// reached: the first records may have been appended. Records with ids can be appended again
    /// safely.
    fn append(&self, records: &[Record]) -> Result<Appended> {
        let appended = self.submit(None, records)?;
        Ok(appended.expect("only an append at an expected end may have no result"))
    }

    /// Appends only if the stream ends at `end`; else returns `None` and appends nothing. So of two
    /// writers that decide on the same state one fails. Ids are neither compared nor remembered.
    ///
    /// # Errors
    /// As [`Appender::append`].
    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.submit(Some(end), records)
    }
}

/// Reads one stream in order of positions.
pub trait Reader: Send {
    /// The next records, at most `most` and about 8 MiB. If there are none, waits for the first up
    /// to `wait`.
    ///
    /// # Errors
    /// Records are missing ([`Error::Gap`]), a record is damaged, or the engine cannot be reached.
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>>;

    /// The position of the next record.
    fn position(&self) -> u64;
}
