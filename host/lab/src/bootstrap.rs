//! The bootstrap (Efron): what is independent of each other, as users are, is drawn with
//! replacement, and every statistic is computed again on the rows of what was drawn.
//!
//! Arms are compared within a replicate, on the same users, so that what they have in common
//! cancels.

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::tally::{ScoreTotals, UserTotals};

/// Fixed, so that every run draws the same.
const SEED: u64 = 0x5EED_B007;

/// The 95 % interval of each statistic that `measure` computes over users, as [`resample`] has it.
pub fn intervals(
    dense: &UserTotals,
    replicates: usize,
    measure: impl Fn(&ScoreTotals) -> Vec<f64>,
) -> Vec<[f64; 2]> {
    resample(dense.users(), replicates, |weights| measure(&dense.totals(Some(weights))))
}

/// The 95 % interval of each statistic that `measure` computes, over `replicates` draws; it is told
/// how often each of `units` was drawn. A statistic that is not finite in a replicate is left out;
/// without any left the interval is NaN.
pub fn resample(
    units: usize,
    replicates: usize,
    measure: impl Fn(&[u32]) -> Vec<f64>,
) -> Vec<[f64; 2]> {
    let mut rng = SmallRng::seed_from_u64(SEED);
    let mut weights = vec![0u32; units];
    let mut drawn: Vec<Vec<f64>> = Vec::new();
    for _ in 0..replicates {
        weights.fill(0);
        for _ in 0..units {
            weights[rng.random_range(0..units)] += 1;
        }
        let values = measure(&weights);
        drawn.resize_with(values.len(), Vec::new);
        for (all, value) in drawn.iter_mut().zip(values) {
            if value.is_finite() {
                all.push(value);
            }
        }
    }
    drawn.into_iter().map(percentiles).collect()
}

/// The 2.5th and the 97.5th percentile.
fn percentiles(mut values: Vec<f64>) -> [f64; 2] {
    values.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = share * (values.len() as f64 - 1.0);
        let (low, high) = (values[rank.floor() as usize], values[rank.ceil() as usize]);
        low + (high - low) * rank.fract()
    };
    if values.is_empty() { [f64::NAN; 2] } else { [at(0.025), at(0.975)] }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Arm 0 costs 1 nat per row. Arm 1 costs less by a user's own amount, of
    /// mean 0.1.
    fn dense(users: usize, spread: f64) -> UserTotals {
        let rows = 10.0;
        let saved = |user: usize| 0.1 + spread * if user.is_multiple_of(2) { 1.0 } else { -1.0 };
        UserTotals {
            rows: vec![rows; users],
            positives: vec![rows / 2.0; users],
            nats: vec![vec![
                vec![rows; users],
                (0..users).map(|user| rows * (1.0 - saved(user))).collect(),
            ]],
        }
    }

    fn interval(dense: &UserTotals) -> [f64; 2] {
        intervals(dense, 2000, |totals| vec![totals.mean_ne_diff_pct(1, 0)])[0]
    }

    #[test]
    fn the_interval_is_that_of_the_mean_over_users() {
        // The difference is a mean of users' savings, -10 % with a deviation of 20 %: its standard
        // error over 400 users is 1 %, so the interval is -10 ± 1.96.
        let [low, high] = interval(&dense(400, 0.2));
        assert!((low + 11.96).abs() < 0.15 && (high + 8.04).abs() < 0.15, "{low} {high}");
        // Four times the users, half the interval.
        let [low, high] = interval(&dense(1600, 0.2));
        assert!((high - low - 1.96).abs() < 0.15, "{low} {high}");
    }

    #[test]
    fn arms_are_compared_on_the_same_users() {
        // The costs of users differ a hundredfold, but each saves exactly a tenth.
        let mut paired = dense(200, 0.0);
        for user in 0..200 {
            let cost = if user % 7 == 0 { 1000.0 } else { 10.0 };
            (paired.nats[0][0][user], paired.nats[0][1][user]) = (cost, 0.9 * cost);
        }
        let [low, high] = interval(&paired);
        assert!((low + 10.0).abs() < 1e-9 && (high + 10.0).abs() < 1e-9, "{low} {high}");
    }

    #[test]
    fn equal_arms_have_an_interval_around_nothing_and_draws_repeat() {
        let mut same = dense(300, 0.3);
        same.nats[0][1].iter_mut().for_each(|nats| *nats += 1.0);
        let [low, high] = interval(&same);
        assert!(low < 0.0 && high > 0.0, "{low} {high}");
        assert_eq!(interval(&same), [low, high]);
    }
}
