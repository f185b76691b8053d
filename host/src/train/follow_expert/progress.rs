//! What a streaming expert tells: progressive NE over a window of requests by the schema's labels, how
//! old events were when they were learned from, and the same as metrics.

use std::sync::Arc;

use hypercast_fm::{
    example::Example,
    metrics::{Keeper, Scored},
};
use prometheus::{GaugeVec, Histogram, IntCounter};
use serde_json::{Value, json};

use super::{super::report::ALL, Place};
use crate::{evaluate::scores::Labels, expert::Blueprint, schema::Schema, telemetry::Telemetry};

/// Requests a line.
const WINDOW: u64 = 1000;

/// Rows kept a window and slice.
const KEEP: usize = 1 << 16;

/// Predictions of the requests since the last line.
pub(super) struct Progress {
    labels: Labels,
    /// Each of the expert's tasks among the schema's, by name.
    tasks: Vec<(Option<usize>, String)>,
    kept: Keeper<(usize, usize)>,
    requests: u64,
    latencies_ms: Vec<i64>,
    meters: Meters,
}

/// The metrics.
struct Meters {
    latency: Histogram,
    ne: GaugeVec,
    requests: IntCounter,
    corrections: IntCounter,
}

impl Progress {
    pub(super) fn new(
        schema: &Arc<Schema>,
        blueprint: &Blueprint,
        telemetry: &Arc<Telemetry>,
    ) -> Self {
        let tasks = blueprint.description.tasks.iter();
        Self {
            labels: Labels::new(schema),
            tasks: tasks.map(|task| (schema.task(&task.name), task.name.clone())).collect(),
            kept: Keeper::new(KEEP),
            requests: 0,
            latencies_ms: Vec::new(),
            meters: Meters {
                latency: telemetry.seconds(
                    "hypercast_event_to_trainer_seconds",
                    "From when the newest event of a request was taken in to when it was learned from",
                ),
                ne: telemetry.gauges(
                    "hypercast_progressive_ne",
                    "NE of the last thousand requests, each predicted before it was learned from",
                    &["surface", "task"],
                ),
                requests: telemetry.counter("hypercast_trained_requests_total", "Requests learned from"),
                corrections: telemetry.counter("hypercast_corrections_total", "Corrections learned from"),
            },
        }
    }

    /// Notes what was said of examples, `[rows]` a task, before they were learned from.
    pub(super) fn push(&mut self, examples: &[Example], predictions: &[Vec<f32>]) {
        let all = self.labels.schema.surfaces.len();
        let rows =
            examples.iter().flat_map(|own| (0..own.targets.len()).map(move |row| (own, row)));
        for (at, (example, row)) in rows.enumerate() {
            for (task, (in_schema, _)) in self.tasks.iter().enumerate() {
                let label = in_schema.and_then(|own| self.labels.label(example, row, own));
                let Some(label) = label else { continue };
                let probability = predictions[task][at];
                let scored = Scored { user: example.user.id, probability, label };
                self.kept.push((usize::from(example.surface), task), scored);
                self.kept.push((all, task), scored);
            }
        }
        self.requests += examples.len() as u64;
        self.meters.requests.inc_by(examples.len() as u64);
    }

    /// Notes how long after its newest event a request was learned from.
    pub(super) fn latency(&mut self, ms: i64) {
        self.meters.latency.observe(ms.max(0) as f64 / 1e3);
        self.latencies_ms.push(ms);
    }

    pub(super) fn corrected(&self, corrections: u64) {
        self.meters.corrections.inc_by(corrections);
    }

    /// A line for every window; the next one then begins.
    pub(super) fn line(&mut self, place: &Place) -> Option<Value> {
        if self.requests < WINDOW {
            return None;
        }
        self.requests = 0;
        let kept = std::mem::replace(&mut self.kept, Keeper::new(KEEP));
        let surfaces = &self.labels.schema.surfaces;
        let slices = kept.summaries().map(|(&(surface, task), summary)| {
            let surface = surfaces.get(surface).map_or(ALL, String::as_str);
            let task = &self.tasks[task].1;
            if let Some(ne) = summary.ne {
                self.meters.ne.with_label_values(&[surface, task]).set(ne);
            }
            json!({ "surface": surface, "task": task, "n": summary.n, "ne": summary.ne })
        });
        let slices: Vec<Value> = slices.collect();
        let mut latencies = std::mem::take(&mut self.latencies_ms);
        latencies.sort_unstable();
        let at = |share: usize| latencies.get(latencies.len() * share / 100).copied();
        Some(json!({
            "kind": "trained", "position": place.position, "requests": place.requests,
            "corrections": place.corrections, "until_ms": place.until_ms,
            "event_to_trainer_ms": { "p50": at(50), "p99": at(99) }, "progressive": slices,
        }))
    }
}
