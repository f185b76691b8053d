//! What demo, evaluation and experiments share of metrics: slices of predictions, rows of tables,
//! and sums of log loss. The formulas of AUC and GAUC are those of `hypercast_fm::metrics`.

use hypercast_core::quantile::quantile;
use hypercast_data::schema::Schema;
use hypercast_fm::metrics::{MetricsWindow, log_loss};
use hypercast_train::report::{ALL, number};
use serde::Serialize;

/// The predictions of one arm for one surface and task. Slices sort in this order.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct MetricSlice<A> {
    /// Index of the surface; the number of surfaces stands for all of them.
    pub surface: usize,
    /// Index of the task in the schema.
    pub task: usize,
    /// What predicted.
    pub arm: A,
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
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Area under the ROC curve.
    pub auc: Option<f64>,
    /// AUC within users.
    pub gauc: Option<f64>,
    /// Predictions.
    pub n: usize,
}

/// The metrics of every slice; those over all surfaces come last.
pub fn metric_rows<A: Ord + Clone>(
    schema: &Schema,
    kept: &MetricsWindow<MetricSlice<A>>,
    name: impl Fn(&A) -> String,
) -> Vec<MetricRow> {
    let rows = kept.summaries().map(|(slice, summary)| MetricRow {
        surface: schema.surfaces.get(slice.surface).map_or(ALL, String::as_str).to_owned(),
        task: schema.tasks[slice.task].name.clone(),
        arm: name(&slice.arm),
        ne: summary.ne,
        auc: summary.auc,
        gauc: summary.gauc,
        n: summary.n,
    });
    rows.collect()
}

/// The rows for people, an arm per line.
pub fn table<'a>(rows: impl IntoIterator<Item = &'a MetricRow>) -> String {
    let mut text = format!(
        "{:<14} {:<17} {:<16} {:>8} {:>8} {:>8} {:>8}\n",
        "surface", "task", "arm", "rows", "NE", "AUC", "GAUC"
    );
    let mut last = None;
    for row in rows {
        let key = (row.surface.as_str(), row.task.as_str());
        // A surface and task is named once.
        let (surface, task) = if last.replace(key) == Some(key) { ("", "") } else { key };
        let [ne, auc, gauc] = [row.ne, row.auc, row.gauc].map(number);
        let (arm, n) = (&row.arm, row.n);
        text += &format!("{surface:<14} {task:<17} {arm:<16} {n:>8} {ne:>8} {auc:>8} {gauc:>8}\n");
    }
    text
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

/// What NE needs of some predictions.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LogLossSums {
    /// Predictions.
    pub count: u64,
    /// Predictions whose label is true.
    pub positives: u64,
    /// The sum of log losses in nats.
    pub log_loss: f64,
}

impl LogLossSums {
    /// The sums of one prediction.
    pub fn of(probability: f32, label: bool) -> Self {
        let log_loss = log_loss(probability, label);
        Self { count: 1, positives: u64::from(label), log_loss }
    }

    /// See [`normalized_entropy`].
    pub fn normalized_entropy(&self) -> Option<f64> {
        normalized_entropy(self.log_loss, self.positives as f64, self.count as f64)
    }
}

impl std::ops::AddAssign for LogLossSums {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.positives += other.positives;
        self.log_loss += other.log_loss;
    }
}

/// Normalised entropy (eq. 5): the mean log loss over that of predicting the rows' own base rate;
/// `None` where all labels are alike. Counts may be fractional, for weighted rows.
pub fn normalized_entropy(log_loss_sum: f64, positives: f64, count: f64) -> Option<f64> {
    let rate = positives / count;
    (rate > 0.0 && rate < 1.0).then(|| {
        let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
        log_loss_sum / count / base
    })
}
