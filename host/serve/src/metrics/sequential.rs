//! The difference between two arms' mean outcomes, with an interval that may be looked at whenever
//! somebody likes.
//!
//! Users are assigned to arms, and a user's rows resemble each other, so the rows of a user count
//! as one draw: a mean `m = Σ r / Σ n` over users, with `r` the outcomes of a user's `n` rows, has
//! the variance `s² = G / (G - 1) · Σ (r - m n)² / (Σ n)²`. So that memory is bounded, users are
//! hashed into [`GROUPS`] groups that count as users do.
//!
//! A usual 95 % interval holds the truth 95 % of the time at one moment that was chosen before.
//! Somebody who looks again and again would find a difference where there is none. Of the sum `S =
//! d V`, with `d` the difference and `V = 1 / (s₁² + s₂²)` the information in it, all of the path
//! stays within `sqrt((V + η) ln((V + η) / (η α²)))` with probability `1 - α` (the normal mixture
//! of Robbins, 1970; for means of any distribution Waudby-Smith et al., *Time-uniform central limit
//! theory and asymptotic confidence sequences*, 2024). `η` chooses when the interval is narrowest,
//! and `p` is the least `α` that excludes no difference.

use hypercast_core::hash::mix64;
use serde::Serialize;

/// Groups of users, each with two sums of 8 bytes a task and arm.
const GROUPS: usize = 1024;

/// The probability with which an interval ever fails to hold the truth.
const ALPHA: f64 = 0.05;

/// The rows of both arms together at which the interval is about the narrowest for what is known,
/// if a user has one row.
const TUNED_ROWS: f64 = 20_000.0;

/// `V / η` where no other `η` gives a narrower interval: `-W(-α² / e) - 1`, by the lower branch of
/// Lambert's function.
const TUNED_RATIO: f64 = 8.2;

/// Below these nothing is said: the central limit is far.
const FEWEST_GROUPS: usize = 100;
const FEWEST_EVENTS: u64 = 20;

/// The outcomes of one arm for one task.
#[derive(Debug, Clone)]
pub struct OutcomeSums {
    groups: Vec<GroupSums>,
    /// Groups that have a row.
    occupied: usize,
    total: GroupSums,
    /// Of the groups' sums.
    products: SumProducts,
    /// Rows whose outcome is not 0, and the squares of outcomes.
    events: u64,
    squares: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct GroupSums {
    outcome: f64,
    rows: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct SumProducts {
    outcome_outcome: f64,
    outcome_rows: f64,
    rows_rows: f64,
}

impl SumProducts {
    fn add(&mut self, times: f64, of: GroupSums) {
        self.outcome_outcome += times * of.outcome * of.outcome;
        self.outcome_rows += times * of.outcome * of.rows;
        self.rows_rows += times * of.rows * of.rows;
    }
}

/// How much better an arm is than another.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SequentialDifference {
    /// Of the means.
    pub difference: f64,
    /// Its 95 % confidence sequence: it holds the truth at all times together with that
    /// probability.
    pub low: f64,
    /// The other end.
    pub high: f64,
    /// The always-valid p-value of no difference.
    pub p: f64,
}

impl Default for OutcomeSums {
    fn default() -> Self {
        OutcomeSums {
            groups: vec![GroupSums::default(); GROUPS],
            occupied: 0,
            total: GroupSums::default(),
            products: SumProducts::default(),
            events: 0,
            squares: 0.0,
        }
    }
}

impl OutcomeSums {
    /// Adds the outcome of a row.
    pub fn push(&mut self, user: u64, outcome: f64) {
        // Another hash than that of users' arms.
        let group = &mut self.groups[mix64(user ^ 0x5eed_0a9e) as usize % GROUPS];
        self.occupied += usize::from(group.rows == 0.0);
        self.products.add(-1.0, *group);
        for sums in [&mut *group, &mut self.total] {
            sums.outcome += outcome;
            sums.rows += 1.0;
        }
        self.products.add(1.0, *group);
        self.events += u64::from(outcome != 0.0);
        self.squares += outcome * outcome;
    }

    /// The number of rows.
    pub fn rows(&self) -> u64 {
        self.total.rows as u64
    }

    /// The number of users, or of groups of them if there are many.
    pub fn users(&self) -> usize {
        self.occupied
    }

    /// The mean outcome of a row; none without one.
    pub fn mean(&self) -> Option<f64> {
        (self.total.rows > 0.0).then(|| self.total.outcome / self.total.rows)
    }

    /// The difference to another arm; none as long as too little is known of either.
    pub fn over(&self, other: &OutcomeSums) -> Option<SequentialDifference> {
        let difference = self.mean()? - other.mean()?;
        let variance = self.variance()? + other.variance()?;
        // The variance that means of as many rows of independent users would have.
        let rows = |sums: &OutcomeSums| sums.row_variance() / sums.total.rows;
        let ideal = rows(self) + rows(other);
        if !(variance > 0.0 && ideal > 0.0) {
            return None;
        }
        let information = 1.0 / variance;
        let per_row = 1.0 / (ideal * (self.total.rows + other.total.rows));
        let eta = TUNED_ROWS * per_row / TUNED_RATIO;
        let ratio = (information + eta) / eta;
        let reach = ((information + eta) * (ratio / (ALPHA * ALPHA)).ln()).sqrt() / information;
        let sum = difference * information;
        let likelihood = (0.5 * sum * sum / (information + eta)).exp() / ratio.sqrt();
        Some(SequentialDifference {
            difference,
            low: difference - reach,
            high: difference + reach,
            p: (1.0 / likelihood).min(1.0),
        })
    }

    /// Of the mean, by groups of users.
    fn variance(&self) -> Option<f64> {
        if self.occupied < FEWEST_GROUPS || self.events < FEWEST_EVENTS {
            return None;
        }
        let (mean, groups) = (self.mean()?, self.occupied as f64);
        let SumProducts { outcome_outcome, outcome_rows, rows_rows } = self.products;
        let squares = outcome_outcome - 2.0 * mean * outcome_rows + mean * mean * rows_rows;
        Some(groups / (groups - 1.0) * squares.max(0.0) / (self.total.rows * self.total.rows))
    }

    /// Of a row's outcome.
    fn row_variance(&self) -> f64 {
        let mean = self.total.outcome / self.total.rows;
        (self.squares / self.total.rows - mean * mean).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws as the world has them: a user is of one arm, comes again and again, and has a rate of
    /// outcomes of his own.
    struct SimulatedTraffic {
        state: u64,
        users: u64,
        /// What the second arm multiplies rates by.
        lift: f64,
    }

    impl SimulatedTraffic {
        fn uniform(&mut self) -> f64 {
            self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            (mix64(self.state) >> 11) as f64 / (1u64 << 53) as f64
        }

        /// How soon a look at every row finds a difference, of so many rows.
        fn found(&mut self, rows: u64, rate: f64) -> Option<u64> {
            let mut arms = [OutcomeSums::default(), OutcomeSums::default()];
            let seed = self.state;
            for row in 0..rows {
                let user = (self.uniform() * self.users as f64) as u64;
                let hash = mix64(user ^ seed);
                let arm = (hash & 1) as usize;
                // A user's rate is from none to twice the mean.
                let own = 2.0 * rate * (hash >> 11) as f64 / (1u64 << 53) as f64;
                let own = if arm == 1 { own * self.lift } else { own };
                let outcome = f64::from(u8::from(self.uniform() < own));
                arms[arm].push(user, outcome);
                if arms[1].over(&arms[0]).is_some_and(|of| of.p < ALPHA) {
                    return Some(row);
                }
            }
            None
        }
    }

    const RUNS: u64 = 500;
    const ROWS: u64 = 20_000;

    fn found(users: u64, rate: f64, lift: f64) -> Vec<u64> {
        let run = |seed| SimulatedTraffic { state: mix64(seed), users, lift }.found(ROWS, rate);
        (0..RUNS).filter_map(run).collect()
    }

    #[test]
    fn whoever_looks_at_every_row_finds_no_more_than_allowed() {
        // Users with 7 to 80 rows each, and outcomes of all and of few rows.
        for (users, rate) in [(3000, 0.3), (250, 0.3), (3000, 0.02)] {
            let wrong = found(users, rate, 1.0).len();
            // 25 are expected at most, and 2.5 standard deviations are 12.
            assert!(wrong <= 37, "{wrong} of {RUNS} with {users} users at {rate}");
        }
    }

    #[test]
    fn a_difference_that_is_there_is_found() {
        let mut found = found(3000, 0.3, 1.15);
        assert!(found.len() >= 475, "{} of {RUNS}", found.len());
        found.sort_unstable();
        let half = found[found.len() / 2];
        assert!(half < 12_000, "half of them after {half} rows");
    }

    #[test]
    fn the_interval_agrees_with_the_p_value_and_little_says_nothing() {
        let mut traffic = SimulatedTraffic { state: 5, users: 2000, lift: 1.0 };
        let mut arms = [OutcomeSums::default(), OutcomeSums::default()];
        for row in 0..40_000u64 {
            let (arm, user) = ((row % 2) as usize, row / 7);
            let rate = if arm == 1 { 0.35 } else { 0.3 };
            arms[arm].push(user, f64::from(u8::from(traffic.uniform() < rate)));
            let Some(found) = arms[1].over(&arms[0]) else {
                assert!(row < 5000);
                continue;
            };
            assert!(row > 500);
            assert_eq!(found.p < ALPHA, found.low > 0.0 || found.high < 0.0, "{found:?}");
        }
        let found = arms[1].over(&arms[0]).unwrap();
        assert!(found.low > 0.0 && found.low < 0.05 && found.high > 0.05, "{found:?}");
        assert!(found.p < 1e-3 && arms[0].rows() == 20_000 && arms[0].users() > 1000, "{found:?}");
        let back = arms[0].over(&arms[1]).unwrap();
        assert!((back.difference + found.difference).abs() < 1e-12 && back.p == found.p);
        let mut never = OutcomeSums::default();
        (0..5000).for_each(|user| never.push(user, 0.0));
        assert_eq!(never.over(&arms[0]), None, "nothing has happened");
    }
}
