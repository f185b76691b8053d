//! Ingest: what callers tell, as records of the `events` stream, durable before
//! they are acknowledged.
//!
//! A record has an id, by default a hash of what it says, so that a body which is
//! sent again changes nothing. Here is what a record means and how it is taken in
//! ([`intake`]); what becomes of it is the joiner's ([`crate::join`]).

pub mod intake;

use hypercast_fm::example::{Item, Outcome, User};
use serde::{Deserialize, Serialize};

use crate::engine::Record;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::{Context, Impression};

/// The layout of records: the first byte of each.
const FORMAT: u8 = 1;

/// A record of [`crate::engine::Topic::events`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fact {
    /// When it was taken in, by the clock of who took it in, milliseconds since the epoch.
    pub ingested_ms: i64,
    /// What it says.
    pub what: What,
}

/// What a record says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum What {
    /// An item was shown; what comes of it will be told.
    Impression(Shown),
    /// Something came of an impression.
    Action(Reaction),
    /// Impressions of one request with all that will be known of them: they are joined at once.
    Whole(Vec<Impression>),
    /// An item's features are new or changed.
    Item(Item),
    /// A user's features are new or changed.
    User(User),
    /// It is so late, and nothing older is expected.
    Tick {
        /// Milliseconds since the epoch.
        time_ms: i64,
    },
}

/// An impression whose outcome is not known yet.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Shown {
    /// The request that showed it; an id of its own where there was none.
    pub request: u64,
    /// Who saw it.
    pub user: u64,
    /// What was shown.
    pub item: u64,
    /// Where: an index into `schema.surfaces`.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The context features.
    pub context: Context,
}

/// What came of an impression, or a part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reaction {
    /// The request that showed the item.
    pub request: u64,
    /// The item.
    pub item: u64,
    /// When it happened, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What is known now: other actions and values stay as they are.
    pub outcome: Outcome,
    /// Whether nothing more will come: actions that are not known did not happen.
    pub complete: bool,
}

/// A record on its way to the stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// The caller's id, if it gave one.
    pub id: Option<u64>,
    /// What it says.
    pub what: What,
}

impl Told {
    /// The record: its id is the caller's or comes from what it says, and differs between kinds.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn record(self, ingested_ms: i64) -> Result<Record> {
        let content = encode(&self.what)?;
        // The kind of record is the first byte of its content.
        let id = match (self.id, &self.what) {
            (_, What::Tick { .. }) => 0,
            (Some(id), _) => hash(&[&content[..1], &id.to_le_bytes()]),
            (None, _) => hash(&[&content]),
        };
        let mut payload = vec![FORMAT];
        payload.extend(encode(&ingested_ms)?);
        payload.extend(content);
        Ok(Record { id, payload })
    }
}

/// How far from the epoch a time may be, in milliseconds: 285,000 years, so that JSON carries it whole and no difference of
/// two overflows.
pub const FARTHEST_MS: i64 = 1 << 53;

/// Refuses a time that nobody can mean, whichever way it came in.
///
/// # Errors
/// A time farther from the epoch than [`FARTHEST_MS`].
pub fn check_time(time_ms: i64) -> Result<()> {
    match time_ms.unsigned_abs() <= FARTHEST_MS.unsigned_abs() {
        true => Ok(()),
        false => Err(Error::invalid(format!(
            "{time_ms} is no time; times are milliseconds since the epoch, at most 2^53"
        ))),
    }
}

impl What {
    /// Refuses it if one of its times is none.
    pub(crate) fn check_times(&self) -> Result<()> {
        match self {
            What::Impression(shown) => check_time(shown.time_ms),
            What::Action(reaction) => check_time(reaction.time_ms),
            What::Whole(rows) => {
                rows.iter().flat_map(|row| [row.time_ms, row.outcome_ms]).try_for_each(check_time)
            }
            What::Tick { time_ms } => check_time(*time_ms),
            What::Item(_) | What::User(_) => Ok(()),
        }
    }
}

impl Fact {
    /// Reads a record of the stream.
    ///
    /// # Errors
    /// One that another version wrote, or that is damaged.
    pub fn decode(payload: &[u8]) -> Result<Fact> {
        match payload.split_first() {
            Some((&FORMAT, fact)) => postcard::from_bytes(fact)
                .map_err(|error| Error::invalid(format!("a record of the events stream: {error}"))),
            other => Err(Error::invalid(format!(
                "a record of the events stream has format {:?}; this version reads {FORMAT}",
                other.map(|(format, _)| format)
            ))),
        }
    }

    /// The newest moment that it speaks of; none where it speaks of no time.
    pub fn time_ms(&self) -> Option<i64> {
        match &self.what {
            What::Impression(shown) => Some(shown.time_ms),
            What::Action(reaction) => Some(reaction.time_ms),
            What::Whole(rows) => rows.iter().map(|row| row.time_ms.max(row.outcome_ms)).max(),
            What::Tick { time_ms } => Some(*time_ms),
            What::Item(_) | What::User(_) => None,
        }
    }
}

/// An id for something that has none, from what it says; not 0, and below 2^53, so that JSON carries it.
pub fn own_id(content: &impl Serialize) -> Result<u64> {
    Ok((hash(&[&encode(content)?]) >> 11).max(1))
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value)
        .map_err(|error| Error::invalid(format!("an event cannot be written: {error}")))
}

/// 64 bits of many, not 0: eight bytes at a time, each spread over all bits.
fn hash(parts: &[&[u8]]) -> u64 {
    let mut hash = 0x9e37_79b9_7f4a_7c15;
    for part in parts {
        for chunk in part.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = hypercast_core::hash::mix64(hash ^ u64::from_le_bytes(word))
                .wrapping_add(0x9e37_79b9);
        }
        hash = hypercast_core::hash::mix64(hash ^ part.len() as u64);
    }
    hash.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(item: u64) -> What {
        let context = Context::default();
        What::Impression(Shown { request: 1, user: 2, item, surface: 0, time_ms: 5, context })
    }

    #[test]
    fn a_record_comes_back_and_the_same_has_the_same_id() {
        let record = |id, what| Told { id, what }.record(77).unwrap();
        let first = record(None, shown(3));
        let fact = Fact::decode(&first.payload).unwrap();
        assert_eq!(fact, Fact { ingested_ms: 77, what: shown(3) });
        assert_eq!(fact.time_ms(), Some(5));
        let later = Told { id: None, what: shown(3) }.record(99).unwrap();
        assert_eq!(later.id, first.id, "when it was taken in is not what it says");
        assert_ne!(record(None, shown(4)).id, first.id);
        assert_eq!(record(Some(9), shown(3)).id, record(Some(9), shown(4)).id);
        let user = What::User(User { id: 3, ..User::default() });
        assert_ne!(record(Some(9), user).id, record(Some(9), shown(4)).id, "kinds differ");
        assert_eq!(record(None, What::Tick { time_ms: 1 }).id, 0, "ticks are never repetitions");
        assert!(Fact::decode(&[2, 0]).unwrap_err().to_string().contains("format Some(2)"));
    }
}
