//! A joiner's options, outputs, counters and metrics.

use hypercast_config::{JoinSettings, JoinerSettings};
use serde::{Deserialize, Serialize};

use super::{JoinedRecord, OutcomeRecord};

/// What determines the output besides the events. They are saved with the state: a joiner that
/// repeats records uses the options of the first time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinerOptions {
    /// How long impressions wait for outcomes.
    pub settings: JoinSettings,
    /// The most history events of an example.
    pub history_len: usize,
    /// The most targets of an example; a larger request becomes several examples.
    pub max_targets: usize,
}

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
    /// `features.max_users`, and events that do not fit the schema.
    pub refused: u64,
}

impl JoinerOptions {
    /// The configured options.
    pub(super) fn of(settings: &JoinerSettings) -> JoinerOptions {
        JoinerOptions {
            settings: settings.join.clone(),
            history_len: settings.history_len,
            max_targets: settings.max_targets,
        }
    }

    /// The rows of a request are numbered with 16 bits.
    pub(super) fn bounded(self) -> JoinerOptions {
        JoinerOptions { max_targets: self.max_targets.clamp(1, usize::from(u16::MAX)), ..self }
    }
}

/// Receives a joiner's measurements; the caller decides how to expose them.
pub trait JoinMetrics: Send + Sync {
    /// An event took `took_ms` milliseconds from its receipt to a stage: `joined` or `told`.
    fn event_latency(&self, stage: &str, took_ms: i64);

    /// A joiner's progress, reported about once a second.
    fn joiner(&self, progress: JoinerProgress);
}

/// A joiner's progress.
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
