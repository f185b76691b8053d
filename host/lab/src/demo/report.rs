//! The demo's result: quality by surface, task and arm, latency by stage, and the time of every
//! step.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;

use crate::{
    metrics::{LatencyQuantiles, MetricRow, table},
    verdict::Verdict,
};

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Default, Serialize)]
pub struct DemoReport {
    /// Quality, over the same rows for every arm of a surface and task.
    pub rows: Vec<MetricRow>,
    /// What FM and experts bring, in words.
    pub verdict: Verdict,
    /// Latency by stage.
    pub latency: BTreeMap<String, LatencyQuantiles>,
    /// Requests replayed.
    pub requests: u64,
    /// Requests answered by the FM's own ranking.
    pub degraded: u64,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
}

impl fmt::Display for DemoReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(&self.rows))?;
        writeln!(f, "\n{:<14} {:>9} {:>9}", "stage", "p50 ms", "p99 ms")?;
        for (stage, latency) in &self.latency {
            writeln!(f, "{stage:<14} {:>9.3} {:>9.3}", latency.p50_ms, latency.p99_ms)?;
        }
        writeln!(f, "\n{} requests, {} degraded", self.requests, self.degraded)?;
        write!(f, "{}\n\n{}", super::step_times(&self.seconds), self.verdict)
    }
}
