//! The quality of predictions over the last minutes, and recent values of measurements. Both have
//! bounded memory.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicU64, Ordering},
};

use hypercast_core::quantile::quantile;
use hypercast_fm::{
    base_rate,
    metrics::{LogLossSums, ScoredValue, ValueSums, calibration},
};

/// Width of a bucket, in milliseconds.
const BUCKET_MS: i64 = 5_000;

/// Buckets that are kept: 20 minutes.
const BUCKETS: usize = 240;

/// Buckets in one point of the series: one minute.
const ROLLING: usize = 12;

/// Predictions of one task with their outcomes, in buckets of equal time.
#[derive(Debug, Clone, Default)]
pub struct QualityWindow {
    buckets: VecDeque<QualityBucket>,
}

#[derive(Debug, Clone, Copy, Default)]
struct QualityBucket {
    from_ms: i64,
    sums: LogLossSums,
    predicted: f64,
    /// Of a regression.
    values: ValueSums,
    /// Values above the mean of all that had come.
    upper: u64,
}

/// Quality of predictions whose outcomes are known.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct LiveQuality {
    /// Number of outcomes.
    pub n: u64,
    /// Normalised entropy (eq. 5); none if all outcomes were equal.
    pub ne: Option<f64>,
    /// Predicted over observed rate, or mean of a regression; none without a positive outcome.
    pub calibration: Option<f64>,
    /// The mean squared error of a regression.
    pub mse: Option<f64>,
    /// That of predicting the mean of its outcomes.
    pub base_mse: Option<f64>,
    /// Outcomes of a regression that were above the mean when they came.
    pub upper: u64,
}

impl LiveQuality {
    /// The error over that of the base rate: NE, or of a regression the squared error over that of
    /// the outcomes' mean as far as it counts, if enough outcomes are on either side of the mean.
    pub fn relative_error(&self) -> Option<f64> {
        let is_enough = self.upper.min(self.n - self.upper) >= base_rate::MIN_ROWS;
        let base_mse = self.base_mse.filter(|&base| base > 0.0 && is_enough);
        self.ne.or_else(|| Some(base_rate::counted_ratio(self.mse? / base_mse?)))
    }
}

impl QualityWindow {
    /// Adds a prediction whose outcome became known.
    pub fn push(&mut self, now_ms: i64, probability: f32, happened: bool) {
        let bucket = self.bucket(now_ms);
        bucket.sums.push(probability, happened);
        bucket.predicted += f64::from(probability);
    }

    /// Adds the prediction of a regression whose outcome became known.
    pub fn push_value(&mut self, now_ms: i64, scored: ScoredValue) {
        let mut all = ValueSums::default();
        self.buckets.iter().for_each(|bucket| all += bucket.values);
        // Without an outcome before it there is no mean, and none is above it.
        let is_upper = f64::from(scored.label) > all.label / all.count as f64;
        let bucket = self.bucket(now_ms);
        bucket.values.push(scored);
        bucket.upper += u64::from(is_upper);
    }

    /// The bucket of a time; the oldest goes if there are too many.
    fn bucket(&mut self, now_ms: i64) -> &mut QualityBucket {
        let from_ms = now_ms - now_ms.rem_euclid(BUCKET_MS);
        if self.buckets.back().is_none_or(|bucket| bucket.from_ms < from_ms) {
            if self.buckets.len() == BUCKETS {
                self.buckets.pop_front();
            }
            self.buckets.push_back(QualityBucket { from_ms, ..QualityBucket::default() });
        }
        self.buckets.back_mut().expect("one was pushed")
    }

    /// The quality over all buckets.
    pub fn quality(&self) -> LiveQuality {
        self.over(0..self.buckets.len())
    }

    /// The quality over several windows.
    pub fn together<'a>(windows: impl Iterator<Item = &'a QualityWindow>) -> LiveQuality {
        let mut buckets = VecDeque::new();
        windows.for_each(|window| buckets.extend(&window.buckets));
        QualityWindow { buckets }.quality()
    }

    /// For each bucket, when it began and the NE of the minute before its end.
    pub fn series(&self) -> Vec<(i64, Option<f64>)> {
        let point = |at: usize| {
            let from = (at + 1).saturating_sub(ROLLING);
            (self.buckets[at].from_ms, self.over(from..at + 1).ne)
        };
        (0..self.buckets.len()).map(point).collect()
    }

    /// When the newest bucket began.
    pub fn newest_ms(&self) -> i64 {
        self.buckets.back().map_or(i64::MIN, |bucket| bucket.from_ms)
    }

    fn over(&self, buckets: std::ops::Range<usize>) -> LiveQuality {
        let buckets = || self.buckets.range(buckets.clone());
        let mut sums = LogLossSums::default();
        buckets().for_each(|bucket| sums += bucket.sums);
        let predicted = buckets().map(|bucket| bucket.predicted).sum();
        let mut values = ValueSums::default();
        buckets().for_each(|bucket| values += bucket.values);
        let regression = values.metrics();
        LiveQuality {
            n: sums.count + values.count,
            ne: sums.normalized_entropy(),
            calibration: calibration(predicted, sums.positives as f64).or(regression.calibration),
            mse: regression.mse,
            base_mse: regression.base_mse,
            upper: buckets().map(|bucket| bucket.upper).sum(),
        }
    }
}

/// Number of values that are kept.
const KEPT: usize = 1024;

/// The newest values of a measurement, and their number since the start. There is no lock, so
/// that a request which adds a value never waits for a page that reads them.
#[derive(Debug)]
pub struct RecentValues {
    /// A ring of the kept values, as bits; NaN where there is none yet.
    ring: Box<[AtomicU64]>,
    count: AtomicU64,
}

impl Default for RecentValues {
    fn default() -> Self {
        let ring = (0..KEPT).map(|_| AtomicU64::new(f64::NAN.to_bits())).collect();
        Self { ring, count: AtomicU64::new(0) }
    }
}

impl RecentValues {
    /// Adds a value; the oldest is dropped.
    pub fn push(&self, value: f64) {
        let at = self.count.fetch_add(1, Ordering::Relaxed) as usize % KEPT;
        self.ring[at].store(value.to_bits(), Ordering::Relaxed);
    }

    /// Values since the start.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The kept values in no particular order.
    pub fn kept(&self) -> Vec<f64> {
        let values = self.ring.iter().map(|bits| f64::from_bits(bits.load(Ordering::Relaxed)));
        values.filter(|value| !value.is_nan()).collect()
    }

    /// Quantiles of the kept values; none before the first value.
    pub fn quantiles<const N: usize>(&self, shares: [f64; N]) -> Option<[f64; N]> {
        let mut values = self.kept();
        (!values.is_empty()).then(|| shares.map(|share| quantile(&mut values, share)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_rate_has_an_ne_of_one_and_memory_is_bounded() {
        let mut window = QualityWindow::default();
        assert_eq!(window.quality(), LiveQuality::default());
        let mut values = QualityWindow::default();
        values.push_value(0, ScoredValue { prediction: 2.0, label: 4.0 });
        values.push_value(BUCKET_MS, ScoredValue { prediction: 2.0, label: 0.0 });
        let quality = values.quality();
        assert_eq!((quality.n, quality.ne, quality.calibration), (2, None, Some(1.0)));
        assert_eq!((quality.mse, quality.base_mse), (Some(4.0), Some(4.0)));
        assert_eq!((quality.ne, quality.relative_error()), (None, None), "two outcomes are few");
        for at in 0..100_000 {
            window.push(at * 1000, 0.25, at % 4 == 0);
        }
        let quality = window.quality();
        assert_eq!(quality.n, (BUCKETS as i64 * BUCKET_MS / 1000) as u64);
        assert!((quality.ne.unwrap() - 1.0).abs() < 1e-9, "{quality:?}");
        assert!((quality.calibration.unwrap() - 1.0).abs() < 1e-9, "{quality:?}");
        assert_eq!(window.series().len(), BUCKETS);
    }

    #[test]
    fn a_regression_counts_once_enough_outcomes_are_on_either_side_of_its_mean() {
        let error = |rows: i64, prediction| {
            let mut window = QualityWindow::default();
            for at in 0..rows {
                let label = if at % 10 == 9 { 10.0 } else { 0.0 };
                window.push_value(at * 100, ScoredValue { prediction, label });
            }
            window.quality().relative_error()
        };
        assert_eq!(error(999, 1.0), None);
        assert!((error(1000, 1.0).unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(error(1000, 400.0), Some(1.0), "how far it is beyond says nothing");
        assert!(error(1000, f32::NAN).unwrap().is_nan());
    }

    #[test]
    fn better_predictions_have_a_lower_ne() {
        let (mut good, mut bad) = (QualityWindow::default(), QualityWindow::default());
        for at in 0..1000 {
            let happened = at % 3 == 0;
            good.push(at, if happened { 0.9 } else { 0.1 }, happened);
            bad.push(at, if happened { 0.2 } else { 0.6 }, happened);
        }
        assert!(good.quality().ne.unwrap() < 0.2 && bad.quality().ne.unwrap() > 1.0);
    }

    #[test]
    fn quantiles_are_those_of_the_last_values() {
        let recent = RecentValues::default();
        assert_eq!(recent.quantiles([0.5]), None);
        for value in 0..KEPT * 3 {
            recent.push(value as f64);
        }
        assert_eq!((recent.count(), recent.kept().len()), (KEPT as u64 * 3, KEPT));
        let [least, median, most] = recent.quantiles([0.0, 0.5, 1.0]).unwrap();
        assert_eq!((least, most), (KEPT as f64 * 2.0, KEPT as f64 * 3.0 - 1.0));
        assert!((median - KEPT as f64 * 2.5).abs() <= 1.0, "{median}");
    }
}
