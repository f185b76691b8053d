//! Dynamic join: events → examples (paper section 3.3.2).
//!
//! An impression waits for its outcomes as long as its surface's observed delays
//! say it should, leaves early once all are known, and is corrected when one comes
//! late. What comes out is a function of the events alone, record by record, so a
//! joiner that crashed makes the same records again and loses or doubles none.
//! It does not train, and it does not run a model.

use hypercast_fm::example::{Example, Item, User};
use serde::{Deserialize, Serialize};

use crate::dataset::Impression;

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
