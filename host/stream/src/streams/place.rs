//! Where a reader stands in a stream, and how a stream can differ from what was read of it.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{StreamRecord, Topic};
use crate::error::{Error, Result};

/// A position in a stream, with a checksum of the record before it, by which a reader knows the
/// stream again: one that lost its tail and grew past the position has another record there, and so
/// has one that was made anew.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamPlace {
    /// The position of the next record.
    pub position: u64,
    /// CRC-32 of the content of the record before; none if that is not known.
    #[serde(default)]
    pub checksum: Option<u32>,
}

impl StreamPlace {
    /// A position without knowledge of the record before it.
    pub fn at(position: u64) -> StreamPlace {
        StreamPlace { position, checksum: None }
    }

    /// The place after a record.
    pub fn after(record: &StreamRecord) -> StreamPlace {
        let checksum = Some(crc32fast::hash(&record.payload));
        StreamPlace { position: record.position + 1, checksum }
    }

    /// The position from which a reader reads, to compare the record before its own first one if
    /// that is known and stored.
    pub(super) fn read_from(&self, first: u64) -> u64 {
        let compare = self.checksum.is_some() && self.position > first;
        self.position - u64::from(compare)
    }

    /// Returns an error if the stream has only other positions than this one.
    pub(super) fn check_span(&self, topic: &Topic, kept: &Range<u64>) -> Result<()> {
        let cause = match self.position {
            position if position < kept.start => GapCause::Deleted { first: kept.start },
            position if position > kept.end => GapCause::Cut { end: kept.end },
            _ => return Ok(()),
        };
        Err(self.gap(topic, cause))
    }

    /// Returns an error if a record that is stored before the position is not the one that was
    /// read; `first` is the first stored position.
    pub(super) fn check_before(&self, topic: &Topic, payload: &[u8], first: u64) -> Result<()> {
        match self.checksum {
            Some(checksum) if checksum != crc32fast::hash(payload) => {
                Err(self.gap(topic, GapCause::Changed { first }))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn gap(&self, topic: &Topic, cause: GapCause) -> Error {
        Error::Gap(StreamGap { topic: topic.clone(), position: self.position, cause })
    }
}

/// Records that a reader should find in a stream are missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamGap {
    /// The stream.
    pub topic: Topic,
    /// The position at which the reader is.
    pub position: u64,
    /// What was found there.
    pub cause: GapCause,
}

/// What a stream has in place of the records that a reader should find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GapCause {
    /// The next records were deleted before they were read.
    Deleted {
        /// The first stored position.
        first: u64,
    },
    /// The stream ends before the position.
    Cut {
        /// The position after the last record.
        end: u64,
    },
    /// The record before the position is another one than was read.
    Changed {
        /// The first stored position.
        first: u64,
    },
    /// A joiner that reads events again makes another record of them than it stored before.
    Unrepeated,
}

impl StreamGap {
    /// How many records are missing; 1 where a stream has other ones and it is not known.
    pub fn missing(&self) -> u64 {
        match self.cause {
            GapCause::Deleted { first } => first.saturating_sub(self.position),
            GapCause::Cut { end } => self.position.saturating_sub(end),
            GapCause::Changed { .. } | GapCause::Unrepeated => 1,
        }
    }

    /// The position from which to read so that no stored record is left out that may be new.
    pub fn next_position(&self) -> u64 {
        match self.cause {
            GapCause::Deleted { first } | GapCause::Changed { first } => first,
            GapCause::Cut { end } => end,
            GapCause::Unrepeated => self.position,
        }
    }
}

impl fmt::Display for StreamGap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StreamGap { topic, position, cause } = self;
        match cause {
            GapCause::Deleted { first } => write!(
                f,
                "stream {topic}: the record at position {position} was deleted before it was read; \
                 the next stored one is {first}"
            ),
            GapCause::Cut { end } => write!(
                f,
                "stream {topic} ends at position {end}, but {position} records of it were read: it \
                 lost its tail, was restored from a backup, or was made anew"
            ),
            GapCause::Changed { first } => write!(
                f,
                "stream {topic}: the record before position {position} is not the one that was \
                 read: the stream lost its tail and has grown again, or was made anew; its first \
                 stored record is {first}"
            ),
            GapCause::Unrepeated => write!(
                f,
                "stream {topic}: read again up to position {position}, the records give another \
                 result than the one that is stored: the stream lost its tail and has grown again, \
                 or was made anew, or the state of this joiner was restored from before a change of \
                 its settings"
            ),
        }
    }
}
