//! Whether predictions are any better than the base rate. Trainers and rollouts ask it alike of
//! what would come in another's place.

/// The fewest rows of either label, or of labels on either side of a regression's mean: of fewer,
/// the best constant is as good as a model.
pub const MIN_ROWS: u64 = 100;

/// The squared error of a regression over that of its labels' mean, as far as it counts beside the
/// NE of binary tasks. One says that the model knows nothing of the labels. A larger one says
/// nothing more, since of a long tail a few rows decide how large it is.
pub fn counted_ratio(ratio: f64) -> f64 {
    // What is not finite is of predictions that are not, and stays visible.
    if ratio.is_finite() { ratio.min(1.0) } else { ratio }
}

/// Says that the mean error of tasks, of regressions the [`counted_ratio`], is no better than that
/// of the base rate; `None` if it is, or without a task.
pub fn no_better(errors: impl IntoIterator<Item = f64>) -> Option<String> {
    let errors: Vec<f64> = errors.into_iter().collect();
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    let is_better = errors.is_empty() || mean < 1.0;
    (!is_better).then(|| {
        format!(
            "the mean error of its tasks is {mean:.4}, no better than that of the base rate (NE, \
             and of regressions the squared error over the mean's, at most 1)"
        )
    })
}

/// Whether errors with this sum of differences to what serves are no improvement on it.
pub fn is_no_gain(gain: f64) -> bool {
    gain.is_nan() || gain <= 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hopeless_regression_outweighs_no_good_task_and_alone_is_no_better() {
        let errors = [0.95, counted_ratio(40.0)];
        assert_eq!(no_better(errors), None);
        assert!(no_better([counted_ratio(40.0)]).is_some() && no_better([0.99]).is_none());
        assert!(no_better([1.02, counted_ratio(0.99)]).is_some());
        assert_eq!(no_better([]), None);
    }

    #[test]
    fn what_is_not_a_number_is_no_better() {
        assert!(no_better([0.5, f64::NAN]).is_some());
        assert!(no_better([0.5, counted_ratio(f64::NAN)]).is_some());
        assert!(no_better([0.5, counted_ratio(f64::INFINITY)]).is_some());
        assert!(is_no_gain(f64::NAN) && is_no_gain(0.0) && !is_no_gain(0.1));
    }
}
