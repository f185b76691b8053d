//! What demo, evaluation and experiments share of metrics: slices of predictions, rows of tables,
//! and sums of log loss. The formulas of AUC and GAUC are those of `hypercast_fm::metrics`.

use std::{collections::BTreeMap, sync::Arc};

use hypercast_core::{quantile::quantile, text_table::TextTable};
use hypercast_data::schema::Schema;
use hypercast_fm::metrics::MetricsWindow;
pub use hypercast_fm::metrics::{LogLossSums, ScoredPrediction, ScoredValue, normalized_entropy};
use hypercast_train::report::{ALL, NamedMetrics, ShownMetrics, number, regressions_and_warnings};
use serde::Serialize;

use crate::{
    demo::replay::PredictionArm,
    reliability::{Reliability, ReliabilityCurve, bins, expected_calibration_error},
};

/// The predictions of one arm for one surface and task. Slices sort in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct MetricSlice<A> {
    /// Index of the surface; the number of surfaces stands for all of them.
    surface: usize,
    /// Index of the task in the schema.
    task: usize,
    /// What predicted.
    arm: A,
}

/// Keeps predictions by slice, each also for all surfaces together.
#[derive(Debug)]
pub struct SlicedPredictions<A: Ord> {
    schema: Arc<Schema>,
    kept: MetricsWindow<MetricSlice<A>>,
}

impl<A: Ord + Clone> SlicedPredictions<A> {
    /// None yet; of each slice at most the newest `keep`.
    pub fn new(schema: &Arc<Schema>, keep: usize) -> Self {
        Self { schema: schema.clone(), kept: MetricsWindow::new(keep) }
    }

    /// Adds a prediction of an arm on a surface.
    pub fn push(&mut self, surface: u16, task: usize, arm: &A, scored: ScoredPrediction) {
        for surface in [usize::from(surface), self.schema.surfaces.len()] {
            self.kept.push(MetricSlice { surface, task, arm: arm.clone() }, scored);
        }
    }

    /// Adds the prediction of a regression, likewise.
    pub fn push_value(&mut self, surface: u16, task: usize, arm: &A, scored: ScoredValue) {
        for surface in [usize::from(surface), self.schema.surfaces.len()] {
            self.kept.push_value(MetricSlice { surface, task, arm: arm.clone() }, scored);
        }
    }

    /// The reliability of every slice of a binary task, likewise.
    pub fn reliability(&self, name: impl Fn(&A) -> String) -> Reliability {
        let mut slices: BTreeMap<&MetricSlice<A>, Vec<ScoredPrediction>> = BTreeMap::new();
        for (slice, row) in self.kept.rows() {
            slices.entry(slice).or_default().push(*row);
        }
        let curves = slices.into_iter().map(|(slice, rows)| {
            let bins = bins(rows);
            ReliabilityCurve {
                surface: self.surface(slice),
                task: self.schema.tasks[slice.task].name.clone(),
                arm: name(&slice.arm),
                ece: expected_calibration_error(&bins),
                bins,
            }
        });
        Reliability(curves.collect())
    }

    fn surface(&self, slice: &MetricSlice<A>) -> String {
        self.schema.surfaces.get(slice.surface).map_or(ALL, String::as_str).to_owned()
    }

    /// The metrics of every slice; those over all surfaces come last.
    pub fn rows(&self, name: impl Fn(&A) -> String) -> Vec<MetricRow> {
        let rows = self.kept.summaries().map(|(slice, summary)| MetricRow {
            surface: self.surface(slice),
            task: self.schema.tasks[slice.task].name.clone(),
            arm: name(&slice.arm),
            metrics: summary.into(),
        });
        rows.collect()
    }
}

/// The metrics of a slice, as tables and JSON show them.
#[derive(Debug, Clone, Serialize)]
pub struct MetricRow {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// What predicted.
    pub arm: String,
    /// What they are.
    #[serde(flatten)]
    pub metrics: ShownMetrics,
}

/// The rows for people, an arm per line.
pub fn table<'a>(rows: impl IntoIterator<Item = &'a MetricRow>) -> String {
    let rows: Vec<&MetricRow> = rows.into_iter().collect();
    let head = ["surface", "task", "arm"];
    let mut table = TextTable::new(3, head.into_iter().chain(["rows", "NE", "AUC", "GAUC"]));
    let mut last = None;
    for row in rows.iter().filter(|row| row.metrics.mse.is_none()) {
        let key = (row.surface.as_str(), row.task.as_str());
        // A surface and task is named once.
        let (surface, task) = if last.replace(key) == Some(key) { ("", "") } else { key };
        let ShownMetrics { n, ne, auc, gauc, .. } = row.metrics;
        let [ne, auc, gauc] = [ne, auc, gauc].map(number);
        let arm = row.arm.clone();
        table.line([surface.into(), task.into(), arm, n.to_string(), ne, auc, gauc]);
    }
    let named = |row: &&MetricRow| NamedMetrics {
        names: vec![row.surface.clone(), row.task.clone(), row.arm.clone()],
        metrics: row.metrics,
        is_base: row.arm == PredictionArm::Base.name(),
    };
    let named: Vec<NamedMetrics> = rows.iter().map(named).collect();
    table.to_string() + &regressions_and_warnings(&head, &named)
}

/// Median and 99th percentile of latencies.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct LatencyQuantiles {
    /// Median in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile in milliseconds.
    pub p99_ms: f64,
}

impl LatencyQuantiles {
    /// Of values in milliseconds; zeros without values.
    pub fn of(mut times_ms: Vec<f64>) -> Self {
        if times_ms.is_empty() {
            return Self::default();
        }
        let [p50_ms, p99_ms] = [0.5, 0.99].map(|share| quantile(&mut times_ms, share));
        Self { p50_ms, p99_ms }
    }
}
