//! What a joiner reports about itself; who shows it decides how.

use super::Counts;

/// Receives a joiner's measurements.
pub trait JoinMetrics: Send + Sync {
    /// An event took `took_ms` milliseconds from its intake to a stage: `joined` or `told`.
    fn event_latency(&self, stage: &str, took_ms: i64);

    /// How far the joiner is, about once a second.
    fn joiner(&self, progress: JoinerProgress);
}

/// How far a joiner is.
#[derive(Debug, Clone, Copy)]
pub struct JoinerProgress {
    /// What became of its events so far.
    pub counts: Counts,
    /// Impressions that wait for outcomes.
    pub impressions: usize,
    /// Actions that wait for their impressions.
    pub orphans: usize,
    /// Events that it has yet to read.
    pub lag_events: u64,
}

/// Drops every measurement.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMetrics;

impl JoinMetrics for NoMetrics {
    fn event_latency(&self, _: &str, _: i64) {}

    fn joiner(&self, _: JoinerProgress) {}
}
