//! Metrics of predicted probabilities: normalised entropy (NE, eq. 5), calibration, AUC and GAUC.
//! Every formula is here once; callers keep the sums or the rows.
//!
//! NE needs only sums ([`LogLossSums`], or [`normalized_entropy`] for weighted or resampled sums).
//! AUC and GAUC need the rows; [`MetricsWindow`] bounds how many it keeps, and its metrics are
//! exact over those.

use std::collections::{BTreeMap, VecDeque};

/// How far [`log_loss`] keeps a probability away from 0 and 1.
pub const PROBABILITY_MARGIN: f64 = 1e-7;

/// The negative logarithm of the probability that was given to the observed label, in nats. The
/// probability is clamped to [`PROBABILITY_MARGIN`], so that one wrong certainty stays finite.
pub fn log_loss(probability: f32, label: bool) -> f64 {
    let p = f64::from(probability).clamp(PROBABILITY_MARGIN, 1.0 - PROBABILITY_MARGIN);
    -if label { p.ln() } else { (1.0 - p).ln() }
}

/// The entropy of a binary label of rate `p`, in nats: the log loss of predicting the base rate,
/// and the expected log loss of the true probability. 0 at rates of 0 and 1.
pub fn binary_entropy(p: f64) -> f64 {
    if p <= 0.0 || p >= 1.0 { 0.0 } else { -(p * p.ln() + (1.0 - p) * (1.0 - p).ln()) }
}

/// Normalised entropy (eq. 5): the mean log loss over that of predicting the rows' own base rate. 1
/// is as good as the base rate, lower is better. `None` where all labels are alike or there are no
/// rows, since the base rate then has no entropy. The counts may be fractional, for weighted rows.
pub fn normalized_entropy(log_loss_sum: f64, positives: f64, count: f64) -> Option<f64> {
    let rate = positives / count;
    (rate > 0.0 && rate < 1.0).then(|| log_loss_sum / count / binary_entropy(rate))
}

/// Predicted over observed positives. `None` without positives.
pub fn calibration(predicted_sum: f64, positives: f64) -> Option<f64> {
    (positives > 0.0).then(|| predicted_sum / positives)
}

/// What NE needs of some predictions. Sums of disjoint sets of rows can be merged.
#[derive(Debug, Clone, Copy, PartialEq, Default, serde::Serialize, serde::Deserialize)]
pub struct LogLossSums {
    /// Rows.
    pub count: u64,
    /// Rows whose label is true.
    pub positives: u64,
    /// The sum of the rows' [`log_loss`], in nats.
    pub log_loss: f64,
}

impl LogLossSums {
    /// The sums of one row.
    pub fn of(probability: f32, label: bool) -> Self {
        Self { count: 1, positives: u64::from(label), log_loss: log_loss(probability, label) }
    }

    /// Adds the prediction for a row with its label.
    pub fn push(&mut self, probability: f32, label: bool) {
        *self += Self::of(probability, label);
    }

    /// Share of positives, 0 without rows.
    pub fn positive_rate(&self) -> f64 {
        self.positives as f64 / self.count.max(1) as f64
    }

    /// The sums as [`normalized_entropy`].
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

/// A prediction with the label that was observed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredPrediction {
    /// The user who made the request; GAUC groups by it.
    pub user: u64,
    /// The predicted probability.
    pub probability: f32,
    /// Whether it happened.
    pub label: bool,
}

/// The metrics of some rows. A metric is `None` where the rows do not define it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct BinaryMetrics {
    /// Rows.
    pub n: usize,
    /// Share of positives.
    pub rate: f64,
    /// The sums as [`normalized_entropy`].
    pub ne: Option<f64>,
    /// Area under the ROC curve. `None` where all labels are alike.
    pub auc: Option<f64>,
    /// AUC within a user, weighted by the user's positives, over users with both labels.
    pub gauc: Option<f64>,
}

/// Computes the metrics of `rows`.
pub fn binary_metrics(rows: &[ScoredPrediction]) -> BinaryMetrics {
    let mut sums = LogLossSums::default();
    rows.iter().for_each(|row| sums.push(row.probability, row.label));
    BinaryMetrics {
        n: rows.len(),
        rate: sums.positive_rate(),
        ne: sums.normalized_entropy(),
        auc: auc(&mut rows.to_vec()),
        gauc: gauc(rows),
    }
}

/// Area under the ROC curve; ties count half. Sorts `rows` by probability. `None` where all labels
/// are alike.
pub fn auc(rows: &mut [ScoredPrediction]) -> Option<f64> {
    rows.sort_unstable_by(|a, b| a.probability.total_cmp(&b.probability));
    let (mut negatives_below, mut positives, mut wins) = (0.0f64, 0.0f64, 0.0f64);
    for tied in rows.chunk_by(|a, b| a.probability == b.probability) {
        let up = tied.iter().filter(|row| row.label).count() as f64;
        let down = tied.len() as f64 - up;
        wins += up * (negatives_below + down / 2.0);
        negatives_below += down;
        positives += up;
    }
    (positives > 0.0 && negatives_below > 0.0).then(|| wins / (positives * negatives_below))
}

/// The mean of each user's AUC, weighted by the user's positives. Users whose labels are all alike
/// do not count; `None` if no user is left.
pub fn gauc(rows: &[ScoredPrediction]) -> Option<f64> {
    let mut sorted = rows.to_vec();
    sorted.sort_unstable_by_key(|row| row.user);
    let (mut total, mut weight) = (0.0, 0.0);
    for user in sorted.chunk_by_mut(|a, b| a.user == b.user) {
        if let Some(area) = auc(user) {
            let positives = user.iter().filter(|row| row.label).count() as f64;
            total += area * positives;
            weight += positives;
        }
    }
    (weight > 0.0).then(|| total / weight)
}

/// Keeps the newest rows of each slice (for example a surface and a task) and computes their
/// metrics.
#[derive(Debug, Clone)]
pub struct MetricsWindow<K> {
    slices: BTreeMap<K, VecDeque<ScoredPrediction>>,
    max_rows: usize,
}

impl<K: Ord + Clone> MetricsWindow<K> {
    /// Keeps at most `max_rows` rows (at least one) of each slice.
    pub fn new(max_rows: usize) -> Self {
        Self { slices: BTreeMap::new(), max_rows: max_rows.max(1) }
    }

    /// Adds a row. Beyond the limit, the oldest row of its slice is dropped.
    pub fn push(&mut self, slice: K, row: ScoredPrediction) {
        let rows = self.slices.entry(slice).or_default();
        if rows.len() == self.max_rows {
            rows.pop_front();
        }
        rows.push_back(row);
    }

    /// Every kept row, slice after slice, the oldest first.
    pub fn rows(&self) -> impl Iterator<Item = (&K, &ScoredPrediction)> {
        self.slices.iter().flat_map(|(slice, rows)| rows.iter().map(move |row| (slice, row)))
    }

    /// The metrics of one slice, if it has rows.
    pub fn summary(&self, slice: &K) -> Option<BinaryMetrics> {
        self.slices.get(slice).map(metrics_of)
    }

    /// The metrics of every slice, in order.
    pub fn summaries(&self) -> impl Iterator<Item = (&K, BinaryMetrics)> {
        self.slices.iter().map(|(slice, rows)| (slice, metrics_of(rows)))
    }
}

fn metrics_of(rows: &VecDeque<ScoredPrediction>) -> BinaryMetrics {
    binary_metrics(&rows.iter().copied().collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(values: &[(u64, f32, bool)]) -> Vec<ScoredPrediction> {
        values
            .iter()
            .map(|&(user, probability, label)| ScoredPrediction { user, probability, label })
            .collect()
    }

    #[test]
    fn the_base_rate_has_an_ne_of_one() {
        let metrics = binary_metrics(&rows(&[
            (1, 0.25, true),
            (1, 0.25, false),
            (2, 0.25, false),
            (2, 0.25, false),
        ]));
        assert!((metrics.ne.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(metrics.auc, Some(0.5));
        assert_eq!(metrics.gauc, Some(0.5), "user 2 has one class and does not count");
    }

    #[test]
    fn auc_and_gauc_differ_where_users_do() {
        // Within each user the order is right; across users it is not.
        let metrics = binary_metrics(&rows(&[
            (1, 0.9, true),
            (1, 0.8, false),
            (2, 0.3, true),
            (2, 0.2, false),
        ]));
        assert_eq!(metrics.gauc, Some(1.0));
        assert_eq!(metrics.auc, Some(0.75));
    }

    #[test]
    fn one_class_gives_no_metric() {
        let metrics = binary_metrics(&rows(&[(1, 0.9, true)]));
        assert_eq!((metrics.n, metrics.ne, metrics.auc), (1, None, None));
        assert_eq!(binary_metrics(&[]).n, 0);
        assert_eq!(normalized_entropy(0.0, 0.0, 0.0), None);
        assert_eq!((binary_entropy(0.0), binary_entropy(1.0)), (0.0, 0.0));
        assert_eq!((calibration(1.0, 0.0), calibration(3.0, 2.0)), (None, Some(1.5)));
    }

    #[test]
    fn sums_of_parts_merge_to_the_sums_of_the_whole() {
        let rows = rows(&[(1, 0.9, true), (1, 0.8, false), (2, 0.3, true), (2, 0.0, true)]);
        let mut merged = LogLossSums::default();
        for half in rows.chunks(2) {
            let mut sums = LogLossSums::default();
            half.iter().for_each(|row| sums.push(row.probability, row.label));
            merged += sums;
        }
        let ne = merged.normalized_entropy().unwrap();
        assert!(ne.is_finite(), "a wrong certainty is clamped");
        assert!((ne - binary_metrics(&rows).ne.unwrap()).abs() < 1e-12);
    }

    #[test]
    fn the_window_is_bounded() {
        let mut window = MetricsWindow::new(2);
        for i in 0..5 {
            let label = i == 4;
            window.push("a", ScoredPrediction { user: i, probability: 0.5, label });
        }
        let all: Vec<_> = window.summaries().collect();
        assert_eq!(all[0].1.n, 2);
        assert_eq!(all[0].1.rate, 0.5);
    }
}
