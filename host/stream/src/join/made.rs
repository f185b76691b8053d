//! What goes into a joiner besides events, and what comes out.

use serde::{Deserialize, Serialize};

use super::Joined;
use hypercast_config::JoinSettings;

/// What shapes the output besides the events. A joiner that makes records anew goes by what it went by before.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Options {
    /// How long impressions wait.
    pub settings: JoinSettings,
    /// Events of history an example holds at most.
    pub history_len: usize,
    /// Targets an example holds at most; a larger request comes as several examples.
    pub max_targets: usize,
}

/// What came out, gathered.
#[derive(Debug, Default)]
pub struct Made {
    /// For the `joined` stream.
    pub joined: Vec<Joined>,
    /// For the `outcomes` stream.
    pub outcomes: Vec<super::Outcome>,
}

/// Takes what a joiner makes, in its order.
pub trait Sink {
    /// For the `joined` stream.
    fn joined(&mut self, joined: Joined);

    /// For the `outcomes` stream.
    fn outcome(&mut self, outcome: super::Outcome);
}

impl Sink for Made {
    fn joined(&mut self, joined: Joined) {
        self.joined.push(joined);
    }

    fn outcome(&mut self, outcome: super::Outcome) {
        self.outcomes.push(outcome);
    }
}

/// What a joiner did since the first event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Records for the `joined` stream.
    pub joined: u64,
    /// Records for the `outcomes` stream.
    pub outcomes: u64,
    /// Impressions that were in an example already.
    pub repeated: u64,
    /// Actions that changed nothing.
    pub unchanged: u64,
    /// Actions that came too late even for a correction.
    pub late: u64,
    /// Actions whose impression did not come.
    pub orphaned: u64,
    /// Requests that left before their windows were over, for want of room (`join.max_impressions`).
    pub early: u64,
    /// Events that were refused: items and users for want of room (`features.max_items`, `features.max_users`), what was
    /// told by another schema.
    pub refused: u64,
}

impl Options {
    /// A unit's rows are counted by 16 bits.
    pub(super) fn bounded(self) -> Options {
        Options { max_targets: self.max_targets.clamp(1, usize::from(u16::MAX)), ..self }
    }
}
