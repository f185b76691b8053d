//! What a streaming trainer tells: progressive NE over a window of requests, how old events were
//! when they were learned from, and the same as metrics.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use hypercast_fm::{
    example::Example,
    metrics::{ScoredValue, TaskMetrics, ValueSums, log_loss, normalized_entropy},
    spec::{FmSpec, TaskLabel, TaskSpec},
    trainer::StepOutput,
};
use prometheus::{Histogram, IntCounter};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    super::{
        progress_log::{self, Learning},
        report::{ALL, ShownMetrics},
    },
    checkpoint::FmCheckpoint,
};
use crate::job_metrics::JobMetrics;
use hypercast_stream::publish::SentPublication;

/// A line of the progress log covers so many requests.
const WINDOW: u64 = 1000;

/// Predictions of some requests, summed up by `surface/task`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ProgressWindow {
    requests: u64,
    slices: BTreeMap<String, WindowSlice>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct WindowSlice {
    n: u64,
    positives: u64,
    /// The sum of cross-entropies, as the bits of an f64: JSON may lose the last one.
    entropy_bits: u64,
    /// Of a regression, in the order of [`ValueSums`], likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    value_bits: Option<[u64; 4]>,
}

impl WindowSlice {
    fn push(&mut self, probability: f32, label: bool) {
        self.n += 1;
        self.positives += u64::from(label);
        let entropy = f64::from_bits(self.entropy_bits) + log_loss(probability, label);
        self.entropy_bits = entropy.to_bits();
    }

    fn push_value(&mut self, prediction: f32, label: f32) {
        let mut sums = self.value_sums();
        sums.push(ScoredValue { prediction, label });
        self.n = sums.count;
        let sums = [sums.label, sums.label_square, sums.prediction, sums.squared_error];
        self.value_bits = Some(sums.map(f64::to_bits));
    }

    fn value_sums(&self) -> ValueSums {
        let sums = self.value_bits.unwrap_or_default().map(f64::from_bits);
        let [label, label_square, prediction, squared_error] = sums;
        ValueSums { count: self.n, label, label_square, prediction, squared_error }
    }

    fn metrics(&self) -> ShownMetrics {
        if self.value_bits.is_some() {
            return TaskMetrics::Regression(self.value_sums().metrics()).into();
        }
        let entropy = f64::from_bits(self.entropy_bits);
        let ne = normalized_entropy(entropy, self.positives as f64, self.n as f64);
        ShownMetrics { n: self.n as usize, ne, ..ShownMetrics::default() }
    }
}

/// The window, and what is not saved with it.
pub(super) struct FmProgress {
    pub(super) window: ProgressWindow,
    surfaces: Vec<String>,
    tasks: Vec<TaskSpec>,
}

impl FmProgress {
    pub(super) fn new(spec: &FmSpec, window: ProgressWindow) -> Self {
        Self { window, surfaces: spec.surfaces.clone(), tasks: spec.tasks.clone() }
    }

    /// Notes what was said of examples before they were learned from.
    pub(super) fn push(&mut self, examples: &[Example], said: &StepOutput) {
        let targets = examples.iter().flat_map(|own| own.targets.iter().map(move |_| own));
        for (row, example) in targets.enumerate() {
            let surface = &self.surfaces[usize::from(example.surface)];
            for (task, TaskSpec { name, label: kind, .. }) in self.tasks.iter().enumerate() {
                let at = row * self.tasks.len() + task;
                if !said.mask[at] || said.predictions[at].is_nan() {
                    continue;
                }
                for surface in [surface.as_str(), ALL] {
                    let slice = self.window.slices.entry(format!("{surface}/{name}"));
                    let (slice, said, label) =
                        (slice.or_default(), said.predictions[at], said.labels[at]);
                    match kind {
                        TaskLabel::Action(_) => slice.push(said, label > 0.5),
                        TaskLabel::Value(_) => slice.push_value(said, label),
                    }
                }
            }
        }
        self.window.requests += examples.len() as u64;
    }

    /// A line for every window; the next one then begins.
    pub(super) fn line(&mut self, place: &FmCheckpoint, learning: &mut Learning) -> Option<Value> {
        if self.window.requests < WINDOW {
            return None;
        }
        let window = std::mem::take(&mut self.window);
        let slices = window.slices.iter().map(|(name, slice)| {
            let (surface, task) = name.split_once('/').unwrap_or((ALL, name));
            progress_log::ProgressSlice { surface, task, metrics: slice.metrics() }
        });
        let stands = json!({
            "position": place.position(), "requests": place.requests,
            "corrections": place.corrections, "until_ms": place.until_ms,
        });
        Some(learning.line(stands, slices))
    }
}

/// The metrics that an FM's trainer serves.
pub(super) struct FmMeters {
    pub(super) learning: Learning,
    publishing: Histogram,
    pausing: Histogram,
    publications: IntCounter,
    pub(super) failures: IntCounter,
    raw_bytes: IntCounter,
    bytes: IntCounter,
}

impl FmMeters {
    pub(super) fn new(telemetry: &Arc<JobMetrics>) -> Self {
        let counter = |name: &str, help: &str| telemetry.counter(name, help);
        Self {
            learning: Learning::new(telemetry),
            publishing: telemetry.seconds(
                "hypercast_publish_seconds",
                "Time of a publication, from the gate to when it is durable",
            ),
            pausing: telemetry.seconds(
                "hypercast_publish_pause_seconds",
                "The part of it in which nothing was learned: the gate, taking what moved, registering",
            ),
            publications: counter("hypercast_publications_total", "Publications"),
            failures: counter("hypercast_publish_failures_total", "Publications that failed"),
            raw_bytes: counter(
                "hypercast_published_raw_bytes_total",
                "Bytes of published weights before compression",
            ),
            bytes: counter("hypercast_published_bytes_total", "Bytes of published records"),
        }
    }

    /// Notes a publication, for which nothing was learned during `pause`.
    pub(super) fn published(&self, pause: Duration, sent: &SentPublication) {
        self.publishing.observe((pause + sent.took).as_secs_f64());
        self.pausing.observe(pause.as_secs_f64());
        self.publications.inc();
        self.raw_bytes.inc_by(sent.stats.raw_bytes);
        self.bytes.inc_by(sent.stats.bytes);
    }
}
