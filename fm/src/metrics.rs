//! Metrics of predicted probabilities: normalised entropy (NE, eq. 5), calibration, AUC and GAUC;
//! of predicted values: squared error, calibration and rank correlation; and of the order within a
//! request: NDCG. Every formula is here once; callers keep the sums or the rows.
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

/// What the squared error and calibration of some predicted values need.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ValueSums {
    /// Rows.
    pub count: u64,
    /// The sum of the labels.
    pub label: f64,
    /// The sum of their squares.
    pub label_square: f64,
    /// The sum of the predictions.
    pub prediction: f64,
    /// The sum of the squared errors.
    pub squared_error: f64,
}

impl ValueSums {
    /// Adds a prediction with its label, both in the label's unit.
    pub fn push(&mut self, ScoredValue { prediction, label }: ScoredValue) {
        let [prediction, label] = [prediction, label].map(f64::from);
        self.count += 1;
        self.label += label;
        self.label_square += label * label;
        self.prediction += prediction;
        self.squared_error += (prediction - label).powi(2);
    }

    /// The metrics that sums give: all but the rank correlation.
    pub fn metrics(&self) -> RegressionMetrics {
        let count = self.count as f64;
        let mean = |sum: f64| (self.count > 0).then(|| sum / count);
        RegressionMetrics {
            n: self.count as usize,
            mse: mean(self.squared_error),
            base_mse: mean((self.label_square - self.label * self.label / count).max(0.0)),
            calibration: (self.label != 0.0).then(|| self.prediction / self.label),
            rank_correlation: None,
        }
    }
}

impl std::ops::AddAssign for ValueSums {
    fn add_assign(&mut self, other: Self) {
        self.count += other.count;
        self.label += other.label;
        self.label_square += other.label_square;
        self.prediction += other.prediction;
        self.squared_error += other.squared_error;
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

/// A predicted value with the one that was observed, both in the label's unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoredValue {
    /// The predicted value.
    pub prediction: f32,
    /// What was observed.
    pub label: f32,
}

/// Normalised discounted cumulative gain (Järvelin and Kekäläinen, 2002) of a request's rows by
/// their predictions: labels are gains, and the place i, from 0, counts 1 / log2(2 + i). 1 is the
/// best order. Rows with one prediction share the places that they take. `None` where all labels
/// are alike, so that every order is as good, or one is negative.
pub fn ndcg(rows: &[ScoredValue]) -> Option<f64> {
    let first = rows.first()?.label;
    if rows.iter().all(|row| row.label == first) || rows.iter().any(|row| row.label < 0.0) {
        return None;
    }
    let discount = |place: usize| 1.0 / (2.0 + place as f64).log2();
    let mut sorted = rows.to_vec();
    sorted.sort_unstable_by(|a, b| b.label.total_cmp(&a.label));
    let gain = |row: &ScoredValue| f64::from(row.label);
    let best: f64 = sorted.iter().enumerate().map(|(place, row)| gain(row) * discount(place)).sum();
    sorted.sort_unstable_by(|a, b| b.prediction.total_cmp(&a.prediction));
    let (mut found, mut place) = (0.0, 0);
    for tied in sorted.chunk_by(|a, b| a.prediction == b.prediction) {
        let places = place..place + tied.len();
        place = places.end;
        let share = places.map(discount).sum::<f64>() / tied.len() as f64;
        found += share * tied.iter().map(gain).sum::<f64>();
    }
    Some(found / best)
}

/// The metrics of a regression's rows. A metric is `None` where the rows do not define it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RegressionMetrics {
    /// Rows.
    pub n: usize,
    /// The mean squared error, in the square of the label's unit. `None` without rows.
    pub mse: Option<f64>,
    /// That of predicting the rows' own mean, which is their variance.
    pub base_mse: Option<f64>,
    /// The sum of the predictions over that of the labels. `None` if the latter is 0.
    pub calibration: Option<f64>,
    /// Spearman's: the correlation of the ranks of predictions and labels; ties have their mean
    /// rank. `None` where all of either are alike.
    pub rank_correlation: Option<f64>,
}

/// The metrics of a task's rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TaskMetrics {
    /// Of a binary task.
    Binary(BinaryMetrics),
    /// Of a regression.
    Regression(RegressionMetrics),
}

impl TaskMetrics {
    /// The number of rows that they are of.
    pub fn n(&self) -> usize {
        match self {
            TaskMetrics::Binary(metrics) => metrics.n,
            TaskMetrics::Regression(metrics) => metrics.n,
        }
    }

    /// Those of a binary task, all `None` of a regression.
    pub fn binary(&self) -> BinaryMetrics {
        match self {
            TaskMetrics::Binary(metrics) => *metrics,
            TaskMetrics::Regression(RegressionMetrics { n, .. }) => {
                BinaryMetrics { n: *n, ..BinaryMetrics::default() }
            }
        }
    }

    /// Those of a regression, all `None` of a binary task.
    pub fn regression(&self) -> RegressionMetrics {
        match self {
            TaskMetrics::Binary(BinaryMetrics { n, .. }) => {
                RegressionMetrics { n: *n, ..RegressionMetrics::default() }
            }
            TaskMetrics::Regression(metrics) => *metrics,
        }
    }
}

/// Computes the metrics of `rows`.
pub fn regression_metrics(rows: &[ScoredValue]) -> RegressionMetrics {
    let count = rows.len() as f64;
    let sum = |value: &dyn Fn(&ScoredValue) -> f64| rows.iter().map(value).sum::<f64>();
    let observed = sum(&|row| row.label.into());
    let mean = observed / count;
    let error = sum(&|row| (f64::from(row.prediction) - f64::from(row.label)).powi(2));
    let base = sum(&|row| (f64::from(row.label) - mean).powi(2));
    RegressionMetrics {
        n: rows.len(),
        mse: (count > 0.0).then(|| error / count),
        base_mse: (count > 0.0).then(|| base / count),
        calibration: (observed != 0.0).then(|| sum(&|row| row.prediction.into()) / observed),
        rank_correlation: rank_correlation(rows),
    }
}

fn rank_correlation(rows: &[ScoredValue]) -> Option<f64> {
    let predictions: Vec<f32> = rows.iter().map(|row| row.prediction).collect();
    let labels: Vec<f32> = rows.iter().map(|row| row.label).collect();
    // The mean of all ranks is the same, with ties too.
    let mean = (rows.len() as f64 - 1.0) / 2.0;
    let [a, b] = [predictions, labels].map(|values| ranks(&values));
    let product = |a: &[f64], b: &[f64]| -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum()
    };
    let spread = (product(&a, &a) * product(&b, &b)).sqrt();
    (spread > 0.0).then(|| product(&a, &b) / spread)
}

/// The rank of each value, from 0; ties have their mean rank.
fn ranks(values: &[f32]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_unstable_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for tied in order.chunk_by(|&a, &b| values[a] == values[b]) {
        let rank = first as f64 + (tied.len() as f64 - 1.0) / 2.0;
        tied.iter().for_each(|&at| ranks[at] = rank);
        first += tied.len();
    }
    ranks
}

/// Keeps the newest rows of each slice (for example a surface and a task) and computes their
/// metrics.
#[derive(Debug, Clone)]
pub struct MetricsWindow<K> {
    slices: BTreeMap<K, VecDeque<ScoredPrediction>>,
    values: BTreeMap<K, VecDeque<ScoredValue>>,
    max_rows: usize,
}

impl<K: Ord + Clone> MetricsWindow<K> {
    /// Keeps at most `max_rows` rows (at least one) of each slice.
    pub fn new(max_rows: usize) -> Self {
        Self { slices: BTreeMap::new(), values: BTreeMap::new(), max_rows: max_rows.max(1) }
    }

    /// Adds a row of a binary task. Beyond the limit, the oldest row of its slice is dropped.
    pub fn push(&mut self, slice: K, row: ScoredPrediction) {
        push_newest(self.slices.entry(slice).or_default(), row, self.max_rows);
    }

    /// Adds a row of a regression, likewise. No slice has rows of both.
    pub fn push_value(&mut self, slice: K, row: ScoredValue) {
        push_newest(self.values.entry(slice).or_default(), row, self.max_rows);
    }

    /// Every kept row of binary tasks, slice after slice, the oldest first.
    pub fn rows(&self) -> impl Iterator<Item = (&K, &ScoredPrediction)> {
        self.slices.iter().flat_map(|(slice, rows)| rows.iter().map(move |row| (slice, row)))
    }

    /// Every kept row of regressions, slice after slice, the oldest first.
    pub fn values(&self) -> impl Iterator<Item = (&K, &ScoredValue)> {
        self.values.iter().flat_map(|(slice, rows)| rows.iter().map(move |row| (slice, row)))
    }

    /// The metrics of one slice, if it has rows.
    pub fn summary(&self, slice: &K) -> Option<TaskMetrics> {
        let binary = self.slices.get(slice).map(metrics_of);
        binary.or_else(|| self.values.get(slice).map(metrics_of_values))
    }

    /// The metrics of every slice, in order.
    pub fn summaries(&self) -> impl Iterator<Item = (&K, TaskMetrics)> {
        let binary = self.slices.iter().map(|(slice, rows)| (slice, metrics_of(rows)));
        let values = self.values.iter().map(|(slice, rows)| (slice, metrics_of_values(rows)));
        binary.chain(values).collect::<BTreeMap<_, _>>().into_iter()
    }
}

fn push_newest<T>(rows: &mut VecDeque<T>, row: T, most: usize) {
    if rows.len() == most {
        rows.pop_front();
    }
    rows.push_back(row);
}

fn metrics_of(rows: &VecDeque<ScoredPrediction>) -> TaskMetrics {
    TaskMetrics::Binary(binary_metrics(&rows.iter().copied().collect::<Vec<_>>()))
}

fn metrics_of_values(rows: &VecDeque<ScoredValue>) -> TaskMetrics {
    TaskMetrics::Regression(regression_metrics(&rows.iter().copied().collect::<Vec<_>>()))
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
    fn ndcg_is_one_in_the_best_order_and_ties_share_their_places() {
        let of = |rows: &[(f32, f32)]| {
            let row = |&(prediction, label): &(f32, f32)| ScoredValue { prediction, label };
            ndcg(&rows.iter().map(row).collect::<Vec<_>>())
        };
        let near = |found: Option<f64>, expected: f64| {
            assert!((found.unwrap() - expected).abs() < 1e-12, "{found:?}, not {expected}");
        };
        let third = 1.0 / 3f64.log2();
        near(of(&[(0.1, 0.0), (0.9, 3.0), (0.5, 1.0)]), 1.0);
        near(of(&[(0.1, 1.0), (0.9, 0.0), (0.0, 0.0)]), third);
        near(of(&[(0.9, 0.0), (0.5, 1.0), (0.1, 3.0)]), (third + 1.5) / (3.0 + third));
        near(of(&[(0.5, 0.0), (0.5, 1.0), (0.1, 0.0)]), (1.0 + third) / 2.0);
        assert_eq!(of(&[(0.1, 1.0), (0.2, 1.0)]), None, "every order is as good");
        assert_eq!((of(&[]), of(&[(0.1, -1.0), (0.2, 1.0)])), (None, None));
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
        window.push_value("b", ScoredValue { prediction: 3.0, label: 1.0 });
        let all: Vec<_> = window.summaries().collect();
        assert_eq!(all[0].1.n(), 2);
        assert_eq!(all[0].1.binary().rate, 0.5);
        assert_eq!(all[1].1.regression().mse, Some(4.0));
    }

    #[test]
    fn values_are_measured_in_their_unit_beside_their_own_mean() {
        let of = |rows: &[(f32, f32)]| {
            let row = |&(prediction, label): &(f32, f32)| ScoredValue { prediction, label };
            regression_metrics(&rows.iter().map(row).collect::<Vec<_>>())
        };
        let metrics = of(&[(1.0, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 8.0)]);
        assert_eq!((metrics.mse, metrics.base_mse), (Some(5.5), Some(12.0)));
        assert_eq!(metrics.calibration, Some(1.0));
        let mut sums = ValueSums::default();
        for (prediction, label) in [(1.0, 0.0), (1.0, 0.0), (2.0, 0.0), (4.0, 8.0)] {
            sums.push(ScoredValue { prediction, label });
        }
        assert_eq!(sums.metrics(), RegressionMetrics { rank_correlation: None, ..metrics });
        // Ranks 0.5, 0.5, 2, 3 and 1, 1, 1, 3.
        let expected = 3.0 / (4.5f64 * 3.0).sqrt();
        assert!((metrics.rank_correlation.unwrap() - expected).abs() < 1e-12, "{metrics:?}");
        assert_eq!(of(&[(2.0, 1.0), (1.0, 2.0)]).rank_correlation, Some(-1.0));
        assert_eq!(of(&[(1.0, 5.0), (1.0, 6.0)]).rank_correlation, None);
        assert_eq!(of(&[]), RegressionMetrics::default());
    }
}
