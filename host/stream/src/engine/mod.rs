//! The engine: durable streams that carry everything that happens from one
//! process to the next: events, joined examples, published weights, versions.
//!
//! A stream (a [`Topic`]) is a sequence of records with positions 0, 1, 2, ...;
//! a record is kept before its append returns, and never changes. There are two
//! engines behind one narrow trait: a directory of one machine, and NATS
//! JetStream across machines. Neither knows what a record means. A third, in
//! memory, serves tests and one process.

mod directory;
mod ids;
mod line;
mod memory;
mod nats;
#[cfg(test)]
mod tests;

use std::{fmt, ops::Range, sync::Arc, time::Duration};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{EngineKind, EngineSettings};

pub use self::directory::Directory;
pub use self::memory::Memory;
pub use self::nats::Nats;

/// Opens the engine that the settings choose.
///
/// # Errors
/// A directory that cannot be made, a server that cannot be reached.
pub fn open(settings: &EngineSettings) -> Result<Arc<dyn Engine>> {
    Ok(match settings.kind {
        EngineKind::Directory => Arc::new(Directory::open(settings)?),
        EngineKind::Nats => Arc::new(Nats::open(settings)?),
    })
}

/// The name of a stream: lower-case letters, digits, `-` and `_`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(String);

impl Topic {
    /// What callers told: impressions, actions, items, users ([`crate::ingest`]).
    pub fn events() -> Topic {
        Topic("events".into())
    }

    /// Joined examples and their corrections, for FM trainers and the logging tier ([`crate::join`]).
    pub fn joined() -> Topic {
        Topic("joined".into())
    }

    /// Joined outcomes without features, for the live state of daemons.
    pub fn outcomes() -> Topic {
        Topic("outcomes".into())
    }

    /// What happened to versions ([`crate::versions`]).
    pub fn versions() -> Topic {
        Topic("versions".into())
    }

    /// The published weights of an FM version ([`crate::publish`]).
    pub fn fm(version: &str) -> Topic {
        Topic(format!("fm-{}", plain(version)))
    }

    /// The published weights of an expert's version.
    pub fn expert(name: &str, version: &str) -> Topic {
        Topic(format!("expert-{}-{}", plain(name), plain(version)))
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Letters and digits as they are, a dot as `_`, anything else by its number, so that two names stay two.
fn plain(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        match c {
            'a'..='z' | '0'..='9' => text.push(c),
            '.' => text.push('_'),
            c => text.push_str(&format!("-{:x}-", c as u32)),
        }
    }
    text
}

/// A record to be appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// A record whose id is among the recent ones of the stream is passed over, so a repeated append changes nothing; 0 for
    /// a record that is never passed over.
    pub id: u64,
    /// At most [`MAX_RECORD_BYTES`].
    pub payload: Vec<u8>,
}

/// A longer record is refused: NATS takes 1 MiB by default, its headers included.
pub const MAX_RECORD_BYTES: usize = 960 << 10;

/// A read ends with the record that reaches so many bytes.
const READ_BYTES: usize = 8 << 20;

/// Refuses records that are too long, before anything is appended.
fn checked(topic: &Topic, records: &[Record]) -> Result<()> {
    let long = records.iter().position(|record| record.payload.len() > MAX_RECORD_BYTES);
    long.map_or(Ok(()), |at| {
        Err(Error::invalid(format!(
            "stream {topic}: record {at} of {} has {} bytes; at most {MAX_RECORD_BYTES} are possible: send less in one record",
            records.len(),
            records[at].payload.len()
        )))
    })
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Where it is in its stream.
    pub position: u64,
    /// What it holds.
    pub payload: Vec<u8>,
}

/// What an append did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The position after the stream's last record.
    pub end: u64,
    /// Records that were passed over, since their ids were there.
    pub repeated: usize,
}

/// Durable streams.
pub trait Engine: Send + Sync {
    /// Opens a stream, which is made if need be, for writing. A directory has one writer a stream, who is so until the
    /// last copy of the appender is dropped; the same engine gives it again.
    ///
    /// # Errors
    /// A stream that another process writes to (the error has its process id), or an engine that cannot be reached.
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>>;

    /// Reads a stream from a position on; one that does not exist yet is empty.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    fn reader(&self, topic: &Topic, from: u64) -> Result<Box<dyn Reader>>;

    /// [`Appender::append_at`] for a stream that several processes write to by turns, as the registry's: this one is its
    /// writer for the call alone, and waits shortly for its turn.
    ///
    /// # Errors
    /// Those of both.
    fn append_at(&self, topic: &Topic, end: u64, records: &[Record]) -> Result<Option<Appended>> {
        self.appender(topic)?.append_at(end, records)
    }

    /// The position of the first record that is kept, and the one after the last.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    fn span(&self, topic: &Topic) -> Result<Range<u64>>;

    /// Lets go of records before a position; about, since they go in larger pieces.
    ///
    /// # Errors
    /// An engine that cannot be reached.
    fn trim(&self, topic: &Topic, before: u64) -> Result<()>;
}

/// Writes to one stream. Threads may share it; appends of several at once share a sync.
pub trait Appender: Send + Sync {
    /// Appends records in order; when it returns they are durable. A record whose id was already given in the same call is
    /// passed over too.
    ///
    /// # Errors
    /// A record that is too long, and then nothing is appended; a full disk, an engine that cannot be reached. Then a
    /// beginning of the records may be there or not; the same records can be appended again if they have ids.
    fn append(&self, records: &[Record]) -> Result<Appended>;

    /// The same, if the stream ends at `end`, else nothing is appended and the answer is `None`: two that
    /// decide on the same state do not both succeed. Ids are neither looked at nor remembered.
    ///
    /// # Errors
    /// As [`Appender::append`].
    fn append_at(&self, end: u64, records: &[Record]) -> Result<Option<Appended>>;
}

/// Reads one stream in order.
pub trait Reader: Send {
    /// The next records, at most `most` and about 8 MiB; where there are none yet, waits for the first up to `wait`.
    ///
    /// # Errors
    /// A position that is no longer kept, damage, an engine that cannot be reached.
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<Stored>>;

    /// The position of the next record.
    fn position(&self) -> u64;
}
