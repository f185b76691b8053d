//! Reliability: what was predicted against what happened, in bins by prediction that hold equally
//! many rows. NE says how good probabilities are, and this where they are too high or too low.

use std::fmt;

use hypercast_core::text_table::TextTable;
use hypercast_train::report::ALL;
use serde::Serialize;

use crate::metrics::ScoredPrediction;

/// Bins of a curve, where there are as many different predictions.
const BINS: usize = 10;

/// Rows of neighbouring predictions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReliabilityBin {
    /// Their number.
    pub n: u64,
    /// The mean of their predictions.
    pub predicted: f64,
    /// The share of them that is positive.
    pub observed: f64,
}

/// The predictions of one arm for one surface and task.
#[derive(Debug, Clone, Serialize)]
pub struct ReliabilityCurve {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// What predicted.
    pub arm: String,
    /// The expected calibration error: the mean over rows of how far their bin's predictions are
    /// from its outcomes.
    pub ece: f64,
    /// From the lowest predictions to the highest.
    pub bins: Vec<ReliabilityBin>,
}

/// The curves of an evaluation.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct Reliability(pub Vec<ReliabilityCurve>);

/// The bins of some rows. Rows with one prediction are in one bin.
pub fn bins(mut rows: Vec<ScoredPrediction>) -> Vec<ReliabilityBin> {
    rows.sort_unstable_by(|a, b| a.probability.total_cmp(&b.probability));
    let count = rows.len();
    let (mut all, mut from) = (Vec::new(), 0);
    for bin in 1..=BINS {
        let mut until = (count * bin / BINS).max(from);
        while until > from
            && until < count
            && rows[until].probability == rows[until - 1].probability
        {
            until += 1;
        }
        let own = &rows[from..until];
        if !own.is_empty() {
            let n = own.len() as f64;
            let predicted: f64 = own.iter().map(|row| f64::from(row.probability)).sum();
            let positives = own.iter().filter(|row| row.label).count() as f64;
            all.push(ReliabilityBin {
                n: own.len() as u64,
                predicted: predicted / n,
                observed: positives / n,
            });
        }
        from = until;
    }
    all
}

/// The expected calibration error of bins; 0 without any.
pub fn expected_calibration_error(bins: &[ReliabilityBin]) -> f64 {
    let rows: u64 = bins.iter().map(|bin| bin.n).sum();
    let off = bins.iter().map(|bin| bin.n as f64 * (bin.predicted - bin.observed).abs());
    off.sum::<f64>() / rows.max(1) as f64
}

/// The curves over all surfaces, by their errors and their ends.
impl fmt::Display for Reliability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["task", "arm", "ECE", "lowest bin", "observed", "highest bin", "observed"];
        let mut table = TextTable::new(2, head);
        let mut last = "";
        for curve in self.0.iter().filter(|curve| curve.surface == ALL) {
            let (Some(low), Some(high)) = (curve.bins.first(), curve.bins.last()) else { continue };
            let task = if last == curve.task { "" } else { &curve.task };
            last = &curve.task;
            let rates = [curve.ece, low.predicted, low.observed, high.predicted, high.observed];
            let names = [task.to_owned(), curve.arm.clone()];
            table.line(names.into_iter().chain(rates.map(|rate| format!("{rate:.4}"))));
        }
        if table.is_empty() { Ok(()) } else { write!(f, "\npredicted and observed:\n{table}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(probability: f32, label: bool) -> ScoredPrediction {
        ScoredPrediction { user: 0, probability, label }
    }

    #[test]
    fn bins_hold_equally_many_rows_and_their_error_is_the_mean_distance() {
        // Of 100 rows with p = at / 100 those of the upper half happen: p is 0.245 too low or high.
        let rows = (0..100u8).map(|at| row(f32::from(at) / 100.0, at >= 50)).collect();
        let bins = bins(rows);
        assert_eq!(bins.len(), BINS);
        assert!(bins.iter().all(|bin| bin.n == 10), "{bins:?}");
        assert!((bins[0].predicted - 0.045).abs() < 1e-6 && bins[0].observed == 0.0);
        assert_eq!(bins[9].observed, 1.0);
        let expected = (0..5).map(|bin| 0.1 * f64::from(bin) + 0.045).sum::<f64>() / 10.0
            + (5..10).map(|bin| 1.0 - 0.1 * f64::from(bin) - 0.045).sum::<f64>() / 10.0;
        assert!((expected_calibration_error(&bins) - expected).abs() < 1e-6);
    }

    #[test]
    fn rows_with_one_prediction_are_one_bin() {
        let rows = (0..30u8).map(|at| row(if at < 29 { 0.2 } else { 0.9 }, at % 5 == 0)).collect();
        let bins = bins(rows);
        assert_eq!(bins.iter().map(|bin| bin.n).collect::<Vec<_>>(), [29, 1]);
        let bin = ReliabilityBin { n: 29, predicted: bins[0].predicted, observed: 6.0 / 29.0 };
        assert_eq!(bins[0], bin);
        assert!(super::bins(Vec::new()).is_empty());
        assert_eq!(expected_calibration_error(&[]), 0.0);
    }
}
