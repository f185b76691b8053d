//! Rolling quality of predictions: NE and calibration of the last minutes, in
//! buckets of equal time, so that memory does not grow.

use std::collections::VecDeque;

/// Milliseconds a bucket.
const BUCKET_MS: i64 = 5_000;

/// Buckets that are kept: 20 minutes.
const BUCKETS: usize = 240;

/// Buckets that a point of the series is over: one minute.
const ROLLING: usize = 12;

/// A task's predictions with their outcomes.
#[derive(Debug, Clone, Default)]
pub struct Window {
    buckets: VecDeque<Bucket>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    from_ms: i64,
    sum: Sum,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    n: u64,
    positives: u64,
    log_loss: f64,
    predicted: f64,
}

/// How good predictions were.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Quality {
    /// Outcomes.
    pub n: u64,
    /// Normalised entropy (eq. 5); none where all outcomes were alike.
    pub ne: Option<f64>,
    /// Predicted over observed; none where nothing happened.
    pub calibration: Option<f64>,
}

impl Window {
    /// Adds a prediction whose outcome became known.
    pub fn push(&mut self, now_ms: i64, probability: f32, happened: bool) {
        let from_ms = now_ms - now_ms.rem_euclid(BUCKET_MS);
        if self.buckets.back().is_none_or(|bucket| bucket.from_ms < from_ms) {
            if self.buckets.len() == BUCKETS {
                self.buckets.pop_front();
            }
            self.buckets.push_back(Bucket { from_ms, sum: Sum::default() });
        }
        let bucket = self.buckets.back_mut().expect("one was pushed");
        let p = f64::from(probability).clamp(1e-6, 1.0 - 1e-6);
        bucket.sum.n += 1;
        bucket.sum.positives += u64::from(happened);
        bucket.sum.log_loss -= if happened { p.ln() } else { (1.0 - p).ln() };
        bucket.sum.predicted += p;
    }

    /// Over all that is kept.
    pub fn quality(&self) -> Quality {
        self.over(0..self.buckets.len())
    }

    /// Over all that several windows keep.
    pub fn together<'a>(windows: impl Iterator<Item = &'a Window>) -> Quality {
        let mut buckets = VecDeque::new();
        windows.for_each(|window| buckets.extend(&window.buckets));
        Window { buckets }.quality()
    }

    /// NE of the minute before the end of each bucket, with the time of its beginning.
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

    fn over(&self, buckets: std::ops::Range<usize>) -> Quality {
        let mut sum = Sum::default();
        for bucket in self.buckets.range(buckets) {
            sum.n += bucket.sum.n;
            sum.positives += bucket.sum.positives;
            sum.log_loss += bucket.sum.log_loss;
            sum.predicted += bucket.sum.predicted;
        }
        let (n, positives) = (sum.n as f64, sum.positives as f64);
        let rate = positives / n;
        let entropy = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
        Quality {
            n: sum.n,
            ne: (sum.positives > 0 && sum.positives < sum.n).then(|| sum.log_loss / n / entropy),
            calibration: (sum.positives > 0).then(|| sum.predicted / positives),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_rate_has_an_ne_of_one_and_memory_is_bounded() {
        let mut window = Window::default();
        assert_eq!(window.quality(), Quality { n: 0, ne: None, calibration: None });
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
    fn better_predictions_have_a_lower_ne() {
        let (mut good, mut bad) = (Window::default(), Window::default());
        for at in 0..1000 {
            let happened = at % 3 == 0;
            good.push(at, if happened { 0.9 } else { 0.1 }, happened);
            bad.push(at, if happened { 0.2 } else { 0.6 }, happened);
        }
        assert!(good.quality().ne.unwrap() < 0.2 && bad.quality().ne.unwrap() > 1.0);
    }
}
