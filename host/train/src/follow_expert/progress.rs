//! What a streaming expert tells: progressive NE over a window of requests by the schema's labels,
//! how old events were when they were learned from, and the same as metrics.

use std::sync::Arc;

use hypercast_fm::{
    example::Example,
    metrics::{MetricsWindow, ScoredPrediction, ScoredValue},
};
use serde_json::{Value, json};

use super::{
    super::{
        progress_log::{Learning, ProgressSlice},
        report::{ALL, ShownMetrics},
    },
    ExpertCheckpoint,
};
use crate::job_metrics::JobMetrics;
use hypercast_data::schema::{Schema, TaskKind};
use hypercast_expert::wasm::contract::Task;

/// A line of the progress log covers so many requests.
const WINDOW: u64 = 1000;

/// Rows kept a window and slice.
const KEEP: usize = 1 << 16;

/// Predictions of the requests since the last line.
pub(super) struct ExpertProgress {
    schema: Arc<Schema>,
    /// Each of the expert's tasks among the schema's, by name.
    tasks: Vec<(Option<usize>, String)>,
    kept: MetricsWindow<(usize, usize)>,
    requests: u64,
    pub(super) learning: Learning,
}

impl ExpertProgress {
    pub(super) fn new(schema: &Arc<Schema>, tasks: &[Task], telemetry: &Arc<JobMetrics>) -> Self {
        let tasks = tasks.iter();
        Self {
            schema: schema.clone(),
            tasks: tasks.map(|task| (schema.task(&task.name), task.name.clone())).collect(),
            kept: MetricsWindow::new(KEEP),
            requests: 0,
            learning: Learning::new(telemetry),
        }
    }

    /// Notes what was said of examples, `[rows]` a task, before they were learned from.
    pub(super) fn push(&mut self, examples: &[Example], predictions: &[Vec<f32>]) {
        let all = self.schema.surfaces.len();
        let rows =
            examples.iter().flat_map(|own| (0..own.targets.len()).map(move |row| (own, row)));
        for (at, (example, row)) in rows.enumerate() {
            for (task, (in_schema, _)) in self.tasks.iter().enumerate() {
                let (outcome, prediction) = (&example.targets[row].outcome, predictions[task][at]);
                let label =
                    in_schema.and_then(|own| self.schema.label(own, example.surface, outcome));
                let Some((label, own)) = label.zip(*in_schema) else { continue };
                for slice in [usize::from(example.surface), all].map(|surface| (surface, task)) {
                    match self.schema.tasks[own].kind {
                        TaskKind::Binary => {
                            let (user, probability, label) =
                                (example.user.id, prediction, label == 1.0);
                            self.kept.push(slice, ScoredPrediction { user, probability, label });
                        }
                        TaskKind::Regression => {
                            self.kept.push_value(slice, ScoredValue { prediction, label });
                        }
                    }
                }
            }
        }
        self.requests += examples.len() as u64;
        self.learning.learned(examples.len() as u64, 0);
    }

    /// A line for every window; the next one then begins.
    pub(super) fn line(&mut self, place: &ExpertCheckpoint) -> Option<Value> {
        if self.requests < WINDOW {
            return None;
        }
        self.requests = 0;
        let kept = std::mem::replace(&mut self.kept, MetricsWindow::new(KEEP));
        let surfaces = &self.schema.surfaces;
        let slices = kept.summaries().map(|(&(surface, task), summary)| ProgressSlice {
            surface: surfaces.get(surface).map_or(ALL, String::as_str),
            task: &self.tasks[task].1,
            metrics: ShownMetrics { auc: None, gauc: None, ..summary.into() },
        });
        let stands = json!({
            "position": place.position, "requests": place.requests,
            "corrections": place.corrections, "until_ms": place.until_ms,
        });
        Some(self.learning.line(stands, slices))
    }
}
