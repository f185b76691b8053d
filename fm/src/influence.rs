//! Bounds what the outcomes of one request can teach.
//!
//! A user who likes all of 8 candidates, where the model expects one like in 30, teaches as many
//! false likes as 30 honest requests teach true ones. No range tells false likes from true ones,
//! but their number does: the sum of a task's errors over a request, which is the gradient of the
//! prediction's bias, is more than chance explains. The loss of such a request is weighted down to
//! what chance explains. One or two surprises are never too many, however rare the action is. A
//! regression has no such sum; the ranges of the schema bound its labels.

use crate::{
    batch::FmBatch,
    spec::{TaskLabel, TaskSpec},
};

/// How unlikely errors are that count in full, as -ln of their probability: about 1 in 1000.
const SURPRISE: f64 = 7.0;

/// By request and task, the factor of the request's loss, `[requests, tasks]`: 1 for what chance
/// explains. `predictions` are probabilities, `[targets, tasks]`.
pub(crate) fn request_factors(
    batch: &FmBatch,
    predictions: &[f32],
    tasks: &[TaskSpec],
) -> Vec<f32> {
    let mut factors = Vec::with_capacity((batch.target_offsets.len() - 1) * tasks.len());
    for ends in batch.target_offsets.windows(2) {
        for (at, task) in tasks.iter().enumerate() {
            let cells = (ends[0]..ends[1]).map(|row| row as usize * tasks.len() + at);
            let cells = cells.filter(|&cell| batch.mask[cell]);
            factors.push(match task.label {
                TaskLabel::Action(_) => {
                    factor(cells.map(|cell| (batch.labels[cell].into(), predictions[cell].into())))
                }
                TaskLabel::Value(_) => 1.0,
            });
        }
    }
    factors
}

/// The greatest errors of a request that count in full, over the sum of its errors, at most 1.
/// Bernstein's inequality: a sum of independent errors with variance V exceeds t with a probability
/// of at most exp(-t² / (2V + 2t/3)).
fn factor(labels_and_predictions: impl Iterator<Item = (f64, f64)>) -> f32 {
    let (mut error, mut variance) = (0.0, 0.0);
    for (label, prediction) in labels_and_predictions {
        error += label - prediction;
        variance += prediction * (1.0 - prediction);
    }
    let most = SURPRISE / 3.0 + ((SURPRISE / 3.0).powi(2) + 2.0 * SURPRISE * variance).sqrt();
    if error.abs() > most { (most / error.abs()) as f32 } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(positives: usize, rows: usize, prediction: f64) -> f32 {
        factor((0..rows).map(|row| (f64::from(u8::from(row < positives)), prediction)))
    }

    #[test]
    fn what_chance_explains_counts_in_full() {
        for prediction in [1e-6, 0.03, 0.5, 0.97] {
            assert_eq!(of(1, 1, prediction), 1.0);
            assert_eq!(of(0, 8, prediction.min(0.5)), 1.0);
        }
        assert_eq!(of(4, 32, 1e-6), 1.0, "a few are never too many");
        assert_eq!(of(8, 8, 0.5), 1.0);
        assert_eq!(of(24, 32, 0.5), 1.0);
    }

    #[test]
    fn more_errors_than_chance_explains_are_bounded_on_both_sides() {
        for (positives, prediction) in [(32, 0.03), (0, 0.97)] {
            let factor = of(positives, 32, prediction);
            // Of 31 errors, with a variance of 0.93.
            assert!((factor * 31.0 - 6.65).abs() < 0.05, "{factor}");
        }
        let many = |rows: usize| of(rows, rows, 0.5) * rows as f32 / 2.0;
        assert!(many(512) < 2.1 * many(128), "they grow as the root of the rows");
    }
}
