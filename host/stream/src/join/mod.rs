//! Dynamic join: events → examples (paper section 3.3.2).
//!
//! An impression waits for its outcomes as long as its surface's observed delays
//! say it should, leaves early once all are known, and is corrected when one comes
//! late. What comes out is a function of the events alone, record by record, so a
//! joiner that crashed makes the same records again and loses or doubles none.
//! It does not train, and it does not run a model.

mod core;
mod delays;
mod folder;
mod made;
mod memory;
mod metrics;
mod outputs;
mod runner;
mod saved;
mod unit;
mod waiting;

use hypercast_fm::example::{Example, Item, User};
use serde::{Deserialize, Serialize};

pub use self::core::Joiner;
pub use self::folder::Folder;
pub use self::made::{Counts, Made, Options, Sink};
pub use self::metrics::{JoinMetrics, JoinerProgress, NoMetrics};
pub use self::runner::world;
pub use self::runner::{Passed, Runner};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::Impression;

/// A record of [`crate::engine::Topic::joined`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Joined {
    /// A request whose impressions all have their outcomes, with features as of its first impression.
    Example(JoinedExample),
    /// Outcomes that came after their example: its targets are those that changed, and only what changed is known of them
    /// (`Outcome::known`).
    Correction(JoinedExample),
}

/// A joined request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct JoinedExample {
    /// The request. Its items have no content vectors: a reader takes those from the data set.
    pub example: Example,
    /// When the newest of its events was taken in, by the clock of who took it in, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// A record of [`crate::engine::Topic::outcomes`]: what the live state of a daemon follows.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// What is known now.
    pub known: Known,
    /// When the newest event that it comes from was taken in, by the clock of who took it in, milliseconds since the epoch.
    pub ingested_ms: i64,
}

/// What is known now.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Known {
    /// An impression's outcome is known.
    Outcome(Impression),
    /// An impression's outcome is another one than was said: this is the whole of what is known now.
    Corrected(Impression),
    /// An item's features are new or changed.
    Item(Item),
    /// A user's features are new or changed.
    User(User),
}

impl Joined {
    /// The example, or the correction.
    pub fn joined(&self) -> &JoinedExample {
        match self {
            Joined::Example(joined) | Joined::Correction(joined) => joined,
        }
    }

    /// Reads a record of the `joined` stream.
    ///
    /// # Errors
    /// One that another version wrote.
    pub fn decode(payload: &[u8]) -> Result<Joined> {
        decode("joined", payload)
    }
}

impl Outcome {
    /// Reads a record of the `outcomes` stream.
    ///
    /// # Errors
    /// One that another version wrote.
    pub fn decode(payload: &[u8]) -> Result<Outcome> {
        decode("outcomes", payload)
    }
}

fn decode<'a, T: Deserialize<'a>>(stream: &str, payload: &'a [u8]) -> Result<T> {
    postcard::from_bytes(payload)
        .map_err(|error| Error::invalid(format!("a record of the {stream} stream: {error}")))
}

#[cfg(test)]
mod tests;
