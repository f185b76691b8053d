//! What the services of training tell: lines of JSON, and metrics of what all that learn from a
//! stream have in common. What was predicted well is each trainer's own.

use std::{io::Write, net::SocketAddr, sync::Arc, time::Duration};

use prometheus::{GaugeVec, Histogram, IntCounter};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{CommonErrors as _, Error, Result};
use crate::job_metrics::{JobMetrics, MetricsServer};
use crate::report::ShownMetrics;
use hypercast_stream::publish::{PublicationKind, PublicationStats};

/// Answers `/metrics` at an address, if one is given, and says where. Dropping the server ends it.
pub(super) fn serve_metrics(
    telemetry: &Arc<JobMetrics>,
    address: Option<SocketAddr>,
    out: &mut dyn Write,
) -> Result<Option<MetricsServer>> {
    let Some(address) = address else { return Ok(None) };
    let server = telemetry.serve(address)?;
    let address = format!("http://{}/metrics", server.address());
    tell(out, &json!({ "kind": "metrics", "address": address }))?;
    Ok(Some(server))
}

/// Writes a line.
///
/// # Errors
/// An output that takes no more.
pub(super) fn tell(out: &mut dyn Write, line: &Value) -> Result<()> {
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Error::io("standard output"))
}

/// The line of a publication.
pub(super) fn told(published: &PublicationStats, position: Value, took: Duration) -> Value {
    let mut line = serde_json::to_value(published).expect("plain values");
    line["kind"] = json!("published");
    line["all"] = json!(published.kind == PublicationKind::Snapshot);
    line["position"] = position;
    line["took_ms"] = json!(took.as_millis() as u64);
    line
}

/// What was learned from, and how old it was.
pub(super) struct Learning {
    latency: Histogram,
    ne: GaugeVec,
    requests: IntCounter,
    corrections: IntCounter,
    /// Of the requests since the last line.
    latencies_ms: Vec<i64>,
}

/// Predictions of a surface and task since the last line.
#[derive(Serialize)]
pub(super) struct ProgressSlice<'a> {
    pub(super) surface: &'a str,
    pub(super) task: &'a str,
    #[serde(flatten)]
    pub(super) metrics: ShownMetrics,
}

impl Learning {
    pub(super) fn new(telemetry: &Arc<JobMetrics>) -> Self {
        Self {
            latency: telemetry.seconds(
                "hypercast_event_to_trainer_seconds",
                "From when the newest event of a request was taken in to when it was learned from",
            ),
            ne: telemetry.gauges(
                "hypercast_progressive_ne",
                "NE of the last thousand requests, each predicted before it was learned from",
                &["surface", "task"],
            ),
            requests: telemetry
                .counter("hypercast_trained_requests_total", "Requests learned from"),
            corrections: telemetry
                .counter("hypercast_corrections_total", "Corrections learned from"),
            latencies_ms: Vec::new(),
        }
    }

    /// Notes how long after its newest event a request was learned from.
    pub(super) fn latency(&mut self, ms: i64) {
        self.latency.observe(ms.max(0) as f64 / 1e3);
        self.latencies_ms.push(ms);
    }

    pub(super) fn learned(&self, requests: u64, corrections: u64) {
        self.requests.inc_by(requests);
        self.corrections.inc_by(corrections);
    }

    /// The line of a window, of where the trainer stands; the next one then begins.
    pub(super) fn line<'a>(
        &mut self,
        mut stands: Value,
        slices: impl Iterator<Item = ProgressSlice<'a>>,
    ) -> Value {
        let slices = slices.map(|slice| {
            if let Some(ne) = slice.metrics.ne {
                self.ne.with_label_values(&[slice.surface, slice.task]).set(ne);
            }
            json!(slice)
        });
        let slices: Vec<Value> = slices.collect();
        let mut latencies = std::mem::take(&mut self.latencies_ms);
        latencies.sort_unstable();
        let at = |share: usize| latencies.get(latencies.len() * share / 100).copied();
        stands["kind"] = json!("trained");
        stands["event_to_trainer_ms"] = json!({ "p50": at(50), "p99": at(99) });
        stands["progressive"] = json!(slices);
        stands
    }
}
