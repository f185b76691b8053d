//! Event records: what callers send, as records of the `events` stream, durable before they are
//! acknowledged.
//!
//! A record has an id, by default a hash of its content, so that a request that is sent again
//! changes nothing. Updates of items and users have one only if the caller gave it. This module
//! defines the records and appends them ([`EventWriter`]); the joiner reads them ([`crate::join`]).

mod writer;

use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::{Item, Outcome, User};
use serde::{Deserialize, Serialize};

pub use self::writer::{AppendReceipt, EventWriter};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::Record;

/// The version of the record layout: the first byte of each record.
const FORMAT: u8 = 1;

/// A record of [`crate::streams::Topic::events`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EventRecord {
    /// When the host received it by its own clock, milliseconds since the epoch.
    pub ingested_ms: i64,
    /// The content.
    pub kind: EventKind,
}

/// The content of an event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum EventKind {
    /// An item was shown; its outcome will follow as actions.
    Impression(ImpressionEvent),
    /// A user acted on an impression.
    Action(ActionEvent),
    /// Impressions of one request together with their outcomes: they are joined at once.
    CompleteRequest(Vec<Impression>),
    /// An item's features are new or changed.
    Item(Item),
    /// A user's features are new or changed.
    User(User),
    /// Watermark: no earlier event will arrive. An ingest host appends its own at their time of
    /// arrival; any other time was sent by a caller who has the right to.
    Tick {
        /// Milliseconds since the epoch.
        time_ms: i64,
    },
    /// What a daemon answered to a request, whose impressions may follow.
    Ranking(RankingEvent),
}

/// An impression whose outcome is unknown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImpressionEvent {
    /// The request that showed the item; a generated id if there was none.
    pub request: u64,
    /// The user.
    pub user: u64,
    /// The item.
    pub item: u64,
    /// The surface, as an index into `schema.surfaces`.
    pub surface: u16,
    /// Milliseconds since the epoch.
    pub time_ms: i64,
    /// The context features.
    pub context: ContextFeatures,
}

/// The ranking of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankingEvent {
    /// The request that was answered.
    pub request: u64,
    /// The version that ranked: `NAME@VERSION` of an expert, or `fm@VERSION`.
    pub arm: String,
    /// The items, in their order.
    pub items: Vec<u64>,
    /// The probability of each place; shorter where the last ones have none.
    pub propensities: Vec<Option<f32>>,
}

impl RankingEvent {
    /// Where an item is in it.
    pub(crate) fn place(&self, item: u64) -> Option<RankedPlace> {
        let position = self.items.iter().position(|own| *own == item)?;
        let propensity = self.propensities.get(position).copied().flatten();
        Some(RankedPlace { position: position as u32, propensity, arm: self.arm.clone() })
    }
}

/// The outcome of an impression, or a part of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ActionEvent {
    /// The request that showed the item.
    pub request: u64,
    /// The item.
    pub item: u64,
    /// Milliseconds since the epoch.
    pub time_ms: i64,
    /// The actions and values known now; the others stay as they were.
    pub outcome: Outcome,
    /// Whether the outcome is complete: actions that are still unknown did not happen.
    pub complete: bool,
}

/// An event to append.
#[derive(Debug, Clone, PartialEq)]
pub struct NewEvent {
    /// The id that the caller gave, if any. An update of an item or user without one is always
    /// appended: it may restore what an update in between had changed.
    pub id: Option<u64>,
    /// The content.
    pub kind: EventKind,
}

impl NewEvent {
    /// Encodes the record. Its id comes from the caller's id or from the content, and differs
    /// between kinds of events.
    ///
    /// # Errors
    /// The event cannot be encoded.
    pub fn record(self, ingested_ms: i64) -> Result<Record> {
        let content = encode(&self.kind)?;
        // The first byte of the content is the kind of event.
        let id = match (self.id, &self.kind) {
            (_, EventKind::Tick { .. } | EventKind::Ranking(_))
            | (None, EventKind::Item(_) | EventKind::User(_)) => 0,
            (Some(id), _) => hash(&[&content[..1], &id.to_le_bytes()]),
            (None, _) => hash(&[&content]),
        };
        let mut payload = vec![FORMAT];
        payload.extend(encode(&ingested_ms)?);
        payload.extend(content);
        Ok(Record { id, payload })
    }
}

/// The largest distance of a timestamp from the epoch in milliseconds: 285,000 years. JSON
/// represents it exactly, and no difference of two timestamps overflows.
const MAX_TIME_MS: i64 = 1 << 53;

/// Returns an error for a timestamp that is out of range.
///
/// # Errors
/// The timestamp is farther from the epoch than 2^53 ms.
pub fn check_time(time_ms: i64) -> Result<()> {
    if time_ms.unsigned_abs() <= MAX_TIME_MS.unsigned_abs() {
        return Ok(());
    }
    Err(Error::invalid(format!("timestamp {time_ms} is out of range (±2^53 ms since 1970)")))
}

impl EventKind {
    /// The timestamps in the event.
    fn times_ms(&self) -> Vec<i64> {
        match self {
            EventKind::Impression(impression) => vec![impression.time_ms],
            EventKind::Action(action) => vec![action.time_ms],
            EventKind::CompleteRequest(rows) => {
                rows.iter().flat_map(|row| [row.time_ms, row.outcome_ms]).collect()
            }
            EventKind::Tick { time_ms } => vec![*time_ms],
            EventKind::Item(_) | EventKind::User(_) | EventKind::Ranking(_) => Vec::new(),
        }
    }

    /// Replaces timestamps after `latest_ms` by it.
    fn bound_times(&mut self, latest_ms: i64) {
        let bound = |time_ms: &mut i64| *time_ms = latest_ms.min(*time_ms);
        match self {
            EventKind::Impression(impression) => bound(&mut impression.time_ms),
            EventKind::Action(action) => bound(&mut action.time_ms),
            EventKind::CompleteRequest(rows) => rows.iter_mut().for_each(|row| {
                bound(&mut row.time_ms);
                bound(&mut row.outcome_ms);
            }),
            EventKind::Tick { time_ms } => bound(time_ms),
            EventKind::Item(_) | EventKind::User(_) | EventKind::Ranking(_) => {}
        }
    }

    /// Returns an error if one of its timestamps is out of range.
    pub(crate) fn check_times(&self) -> Result<()> {
        self.times_ms().into_iter().try_for_each(check_time)
    }
}

impl EventRecord {
    /// Decodes a record of the stream.
    ///
    /// # Errors
    /// The record was written by another version or is damaged.
    pub fn decode(payload: &[u8]) -> Result<EventRecord> {
        match payload.split_first() {
            Some((&FORMAT, event)) => postcard::from_bytes(event).map_err(|error| {
                Error::internal(format!("a record of the events stream is damaged: {error}"))
            }),
            other => Err(Error::internal(format!(
                "a record of the events stream has format {:?}; this version reads {FORMAT}",
                other.map(|(format, _)| format)
            ))),
        }
    }

    /// Corrects clocks that are ahead, as far as the clocks that saw the event arrive show it: the
    /// ingest host's, and that of the stream's server if it has one. `ingested_ms` becomes the
    /// earlier of the two, and no timestamp stays after the later one.
    #[must_use]
    pub(crate) fn bounded(mut self, stored_ms: Option<i64>) -> EventRecord {
        let stored_ms = stored_ms.unwrap_or(self.ingested_ms);
        let arrived_ms = self.ingested_ms.min(stored_ms);
        match &mut self.kind {
            EventKind::Tick { time_ms } if *time_ms == self.ingested_ms => *time_ms = arrived_ms,
            EventKind::Tick { .. } => {}
            kind => kind.bound_times(self.ingested_ms.max(stored_ms)),
        }
        self.ingested_ms = arrived_ms;
        self
    }

    /// How far the event shows time to have come: to its newest timestamp, but not beyond its
    /// arrival. `None` if it has no timestamp.
    pub(crate) fn reached_ms(&self) -> Option<i64> {
        let arrived_ms = match self.kind {
            EventKind::Tick { .. } => i64::MAX,
            _ => self.ingested_ms,
        };
        self.time_ms().map(|time_ms| time_ms.min(arrived_ms))
    }

    /// The newest timestamp in the event; `None` if it has none.
    pub fn time_ms(&self) -> Option<i64> {
        self.kind.times_ms().into_iter().max()
    }
}

/// An id for something without one, from its content: not 0, and below 2^53, so that JSON
/// represents it exactly.
pub fn content_id(content: &impl Serialize) -> Result<u64> {
    Ok((hash(&[&encode(content)?]) >> 11).max(1))
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value)
        .map_err(|error| Error::internal(format!("cannot encode an event: {error}")))
}

/// A 64-bit hash, never 0: mixes in eight bytes at a time.
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

    fn shown(item: u64) -> EventKind {
        let context = ContextFeatures::default();
        EventKind::Impression(ImpressionEvent {
            request: 1,
            user: 2,
            item,
            surface: 0,
            time_ms: 5,
            context,
        })
    }

    #[test]
    fn a_record_decodes_and_equal_content_has_the_same_id() {
        let record = |id, kind| NewEvent { id, kind }.record(77).unwrap();
        let first = record(None, shown(3));
        let event = EventRecord::decode(&first.payload).unwrap();
        assert_eq!(event, EventRecord { ingested_ms: 77, kind: shown(3) });
        assert_eq!(event.time_ms(), Some(5));
        let later = NewEvent { id: None, kind: shown(3) }.record(99).unwrap();
        assert_eq!(later.id, first.id, "the time of receipt is not part of the content");
        assert_ne!(record(None, shown(4)).id, first.id);
        assert_eq!(record(Some(9), shown(3)).id, record(Some(9), shown(4)).id);
        let user = EventKind::User(User { id: 3, ..User::default() });
        assert_ne!(record(Some(9), user).id, record(Some(9), shown(4)).id, "kinds differ");
        assert_eq!(record(None, EventKind::Tick { time_ms: 1 }).id, 0, "every tick is appended");
        let item = || EventKind::Item(Item { id: 3, ..Item::default() });
        assert_eq!(record(None, item()).id, 0, "it may be what the item was before");
        assert_eq!(record(Some(9), item()).id, record(Some(9), item()).id);
        assert!(EventRecord::decode(&[2, 0]).unwrap_err().to_string().contains("format Some(2)"));
    }
}
