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

/// Where a reader stands, and earlier places at which it stood: near ones closely, far ones
/// sparsely. If the stream lost its tail and grew again, the newest of them that the stream still
/// has tells from where on it has other records. From there the reader reads about as many records
/// twice as were lost, and leaves none out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamTrail {
    /// Where it stands.
    #[serde(flatten)]
    place: StreamPlace,
    /// Oldest first. Each is before the next one, and at most some hundred are there.
    #[serde(default)]
    earlier: Vec<StreamPlace>,
}

impl StreamTrail {
    /// Of a reader that stands at `place` and stood at the earlier ones, oldest first.
    pub fn new(place: StreamPlace, earlier: Vec<StreamPlace>) -> StreamTrail {
        let mut trail = StreamTrail::default();
        earlier.into_iter().chain([place]).for_each(|place| trail.move_to(place));
        trail
    }

    /// Where the reader stands.
    pub fn place(&self) -> StreamPlace {
        self.place
    }

    /// Where it stood before, oldest first.
    pub fn earlier(&self) -> &[StreamPlace] {
        &self.earlier
    }

    /// Moves to another place, before which nothing is known of a stream if it is an earlier one.
    pub fn move_to(&mut self, place: StreamPlace) {
        let left = std::mem::replace(&mut self.place, place);
        self.earlier.extend(Some(left).filter(|left| left.checksum.is_some()));
        while self.earlier.pop_if(|earlier| earlier.position >= place.position).is_some() {}
        self.thin_out();
    }

    /// Drops a place if those around it are close to each other, as seen from where the reader is.
    fn thin_out(&mut self) {
        let distance = |earlier: &StreamPlace| self.place.position - earlier.position;
        let mut at = 1;
        while at + 1 < self.earlier.len() {
            let (before, after) =
                (distance(&self.earlier[at - 1]), distance(&self.earlier[at + 1]));
            if before <= after.saturating_mul(2) {
                self.earlier.remove(at);
            } else {
                at += 1;
            }
        }
    }
}

impl From<StreamPlace> for StreamTrail {
    fn from(place: StreamPlace) -> StreamTrail {
        StreamTrail { place, earlier: Vec::new() }
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
