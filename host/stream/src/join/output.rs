//! A joiner's outputs, counters and metrics.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{JoinedRecord, OutcomeRecord};
use crate::dead_letters::SetAsideRate;
use crate::streams::Topic;

/// A joiner's output in memory.
#[derive(Debug, Default)]
pub struct JoinerOutput {
    /// Records for the `joined` stream.
    pub joined: Vec<JoinedRecord>,
    /// Records for the `outcomes` stream.
    pub outcomes: Vec<OutcomeRecord>,
}

/// Receives a joiner's output in order.
pub trait JoinSink {
    /// Records for the `joined` stream.
    fn joined(&mut self, joined: JoinedRecord);

    /// Records for the `outcomes` stream.
    fn outcome(&mut self, outcome: OutcomeRecord);
}

impl JoinSink for JoinerOutput {
    fn joined(&mut self, joined: JoinedRecord) {
        self.joined.push(joined);
    }

    fn outcome(&mut self, outcome: OutcomeRecord) {
        self.outcomes.push(outcome);
    }
}

/// What a joiner did since the first event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinerCounts {
    /// Records for the `joined` stream.
    pub joined: u64,
    /// Records for the `outcomes` stream.
    pub outcomes: u64,
    /// Impressions that were skipped because they came before.
    pub repeated: u64,
    /// Actions that changed no outcome.
    pub unchanged: u64,
    /// Actions that came too late even for a correction.
    pub late: u64,
    /// Actions that were dropped because their impression did not come.
    pub orphaned: u64,
    /// Requests that were joined before their windows were over, for lack of room
    /// (`join.max_impressions`).
    pub early: u64,
    /// Events that were refused: items and users beyond `features.max_items` and
    /// `features.max_users`, and events that cannot be read or do not fit the schema, which are set
    /// aside.
    pub refused: u64,
    /// Rankings that were dropped before their impressions came, for lack of room. They are counted
    /// and saved by themselves, because states of earlier releases lack the number.
    #[serde(skip)]
    pub unplaced: u64,
}

/// Receives a joiner's measurements; the caller decides how to expose them.
pub trait JoinMetrics: Send + Sync {
    /// An event took `took_ms` milliseconds from its receipt to a stage: `joined` or `told`.
    fn event_latency(&self, stage: &str, took_ms: i64);

    /// A joiner's progress, reported about once a second.
    fn joiner(&self, progress: JoinerProgress);

    /// Counts the events that the joiner sets aside.
    fn set_aside_rate(&self) -> Arc<SetAsideRate>;

    /// Records of a stream are missing.
    fn stream_gap(&self, topic: &Topic);
}

/// How far a joiner has come in the stream of events.
#[derive(Debug, Clone, Copy)]
pub struct JoinerProgress {
    /// Counters since the first event.
    pub counts: JoinerCounts,
    /// Impressions that wait for outcomes or can be corrected.
    pub impressions: usize,
    /// Actions that wait for their impressions.
    pub orphans: usize,
    /// Events that are not read yet.
    pub lag_events: u64,
}
