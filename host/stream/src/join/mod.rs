//! Dynamic join: events become examples (paper section 3.3.2).
//!
//! An impression waits for its outcomes as long as the observed delays of its surface suggest. It
//! is joined early once all outcomes are known, and corrected if one comes late. The output is a
//! function of the events alone, record by record: a joiner that crashed produces the same records
//! again, and none is lost or doubled. Nothing here trains or runs a model.

mod content;
mod core;
mod delays;
mod output;
mod output_streams;
mod pending;
mod rankings;
mod rehearsal;
mod runner;
mod saved;
mod state_dir;
mod stored_records;
#[cfg(test)]
mod tests;
mod waiting;

pub use hypercast_config::JoinerOptions;
use hypercast_data::dataset::Impression;
use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::{Example, Item, User};
use serde::{Deserialize, Deserializer, Serialize};

pub use self::content::ContentPlace;
pub use self::core::Joiner;
pub use self::output::{JoinMetrics, JoinSink, JoinerCounts, JoinerOutput, JoinerProgress};
pub use self::runner::{JoinerPosition, Runner, is_state_of, join_record, state_fingerprint};
pub use self::state_dir::StateDir;
use crate::error::{CommonErrors as _, Error, Result};

/// A record of [`crate::streams::Topic::joined`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum JoinedRecord {
    /// A request whose impressions all have their outcomes, with features as of its first
    /// impression.
    Example(JoinedExample),
    /// Outcomes that came after their example. The targets are those that changed, and only the
    /// changes are known (`Outcome::known`).
    Correction(JoinedExample),
    /// An item's content vector, before the examples whose items refer to it ([`ContentPlace`]).
    Content(ContentRecord),
}

/// A request with its known outcomes, as trainers read it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinedExample {
    /// The request. An item has the place of its content vector ([`ContentPlace`]) if that came
    /// by an event; else a reader adds that of the data set.
    pub example: Example,
    /// When the newest of its events was received by the host's clock, milliseconds since the
    /// epoch.
    pub ingested_ms: i64,
    /// Where each target was ranked before it was shown, if that is known; empty if it is of none,
    /// as in records of earlier releases, which end before.
    #[serde(deserialize_with = "or_default")]
    pub ranked: Vec<Option<RankedPlace>>,
}

/// An item's content vector that came by an event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContentRecord {
    /// The id of the item, which is known.
    pub item: u64,
    /// Of unit norm, or all zeros.
    pub vector: Vec<f32>,
    /// When the event that led to this record was received, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// A record of [`crate::streams::Topic::outcomes`]; daemons update their
/// features from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutcomeRecord {
    /// What changed.
    pub update: StateUpdate,
    /// When the newest event that it comes from was received by the host's clock, milliseconds
    /// since the epoch.
    pub ingested_ms: i64,
    /// Where an impression's item was ranked before it was shown, if that is known. Records of
    /// earlier releases end before.
    #[serde(deserialize_with = "or_default")]
    pub ranked: Option<RankedPlace>,
}

/// A change of what the feature state knows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum StateUpdate {
    /// The outcome of an impression.
    Outcome(Impression),
    /// A changed outcome of an impression: all of what is known now.
    Corrected(Impression),
    /// An item's features are new or changed.
    Item(Item),
    /// A user's features are new or changed.
    User(User),
}

impl JoinedRecord {
    /// The example or the correction; none of a content vector.
    pub fn joined(&self) -> Option<&JoinedExample> {
        match self {
            JoinedRecord::Example(joined) | JoinedRecord::Correction(joined) => Some(joined),
            JoinedRecord::Content(_) => None,
        }
    }

    /// When the newest of its events was received.
    pub fn ingested_ms(&self) -> i64 {
        match self {
            JoinedRecord::Example(joined) | JoinedRecord::Correction(joined) => joined.ingested_ms,
            JoinedRecord::Content(content) => content.ingested_ms,
        }
    }

    /// Decodes a record of the `joined` stream.
    ///
    /// # Errors
    /// The record was written by another version, or is damaged.
    pub fn decode(payload: &[u8]) -> Result<JoinedRecord> {
        decode("joined", payload)
    }
}

impl OutcomeRecord {
    /// Decodes a record of the `outcomes` stream.
    ///
    /// # Errors
    /// The record was written by another version, or is damaged.
    pub fn decode(payload: &[u8]) -> Result<OutcomeRecord> {
        decode("outcomes", payload)
    }
}

/// Reads a field that records or states of earlier releases end before. Checksums guard both, so an
/// end is no damage.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    from: D,
) -> std::result::Result<T, D::Error> {
    Ok(T::deserialize(from).unwrap_or_default())
}

/// Records of both streams begin with the number of their variant, which is smaller than this. A
/// later version of the format begins with a number from here on.
const LATER_FORMATS: u8 = 16;

fn decode<'a, T: Deserialize<'a>>(stream: &str, payload: &'a [u8]) -> Result<T> {
    let wrong = |why: String| Error::internal(format!("a record of the {stream} stream: {why}"));
    if let Some(format @ LATER_FORMATS..) = payload.first() {
        return Err(wrong(format!(
            "its format {format} is of a later version of hypercast; use that version"
        )));
    }
    postcard::from_bytes(payload).map_err(|error| wrong(error.to_string()))
}

#[cfg(test)]
#[test]
fn records_of_a_later_format_are_refused_as_such() {
    for format in [LATER_FORMATS, u8::MAX] {
        let error = JoinedRecord::decode(&[format, 0, 0]).unwrap_err().to_string();
        assert!(error.contains("later version"), "{error}");
    }
    let error = OutcomeRecord::decode(&[3]).unwrap_err().to_string();
    assert!(!error.contains("later version"), "{error}");
}
