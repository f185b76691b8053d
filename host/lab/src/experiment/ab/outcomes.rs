//! What came of the arms, and how far they differ, with intervals that hold whenever somebody
//! looks.
//!
//! Users are assigned, so users are what varies. Engagement is that of a user and a day, with zeros
//! for a day without a session. From it is subtracted what the user's days before the test explain
//! (CUPED: Deng et al., WSDM 2013), which needs nothing of the test itself and so shifts no arm.

use std::collections::BTreeMap;

use hypercast_core::hash::mix_parts;
use hypercast_data::dataset::Impression;
use hypercast_serve::metrics::sequential::{OutcomeSums, SequentialDifference};
use serde::Serialize;

use super::world::{ACTION_VALUES, DAY_MS, START_MS};

/// What is counted of a user's day.
const OF_DAY: usize = 3;

/// What is reported, the user's days first.
pub const METRICS: [&str; 6] = [
    "value a user and day",
    "clicks a user and day",
    "pages a user and day",
    "value a shown item",
    "fresh share of shown",
    "fresh share of clicks",
];
const VALUE_SHOWN: usize = 3;
const FRESH_SHOWN: usize = 4;
const FRESH_CLICKS: usize = 5;

/// With fewer users in one of two arms nothing is said of how they differ.
pub const FEWEST_USERS: usize = 100;

/// The sums of all arms.
#[derive(Debug, Clone)]
pub struct ArmTotals {
    arms: Vec<[OutcomeSums; METRICS.len()]>,
}

/// An arm's mean, beside those of others.
#[derive(Debug, Clone, Serialize)]
pub struct AbRow {
    /// The seed, or `all`.
    pub seed: String,
    /// One of [`METRICS`].
    pub metric: &'static str,
    /// The arm.
    pub arm: String,
    /// Its users, or groups of users if there are many.
    pub users: usize,
    /// Users' days, or shown items, or clicks.
    pub rows: u64,
    /// The mean.
    pub mean: Option<f64>,
    /// How much more it has than another arm, by the name of that: the 95 % confidence sequence.
    pub over: BTreeMap<String, Option<SequentialDifference>>,
}

impl ArmTotals {
    /// Before anything is counted.
    pub fn new(arms: usize) -> Self {
        Self { arms: (0..arms).map(|_| Default::default()).collect() }
    }

    /// How much more of a metric an arm has than another; none as long as too little is known.
    pub fn difference(
        &self,
        metric: usize,
        arm: usize,
        over: usize,
    ) -> Option<SequentialDifference> {
        self.arms[arm][metric].over(&self.arms[over][metric])
    }

    /// A row for each metric and arm, which is compared with those before it.
    pub fn rows(&self, seed: &str, names: &[&str]) -> Vec<AbRow> {
        let mut rows = Vec::new();
        for (metric, name) in METRICS.into_iter().enumerate() {
            for (arm, sums) in self.arms.iter().enumerate() {
                let over =
                    |other: usize| (names[other].to_owned(), self.difference(metric, arm, other));
                rows.push(AbRow {
                    seed: seed.to_owned(),
                    metric: name,
                    arm: names[arm].to_owned(),
                    users: sums[metric].users(),
                    rows: sums[metric].rows(),
                    mean: sums[metric].mean(),
                    over: (0..arm).map(over).collect(),
                });
            }
        }
        rows
    }

    fn push(&mut self, arm: usize, metric: usize, user: u64, outcome: f64) {
        self.arms[arm][metric].push(user, outcome);
    }
}

/// The sums of a user's day.
type UserDay = [f64; OF_DAY];

/// What users did before the test: it explains a part of what they do in it.
#[derive(Debug, Clone)]
pub struct UserBaseline {
    /// By user: the means of a day, less those of all users.
    of_users: Vec<UserDay>,
    /// How much of such a difference returns in later days.
    returns: UserDay,
}

impl UserBaseline {
    /// From what was shown in `days` before the test: the later half of them predicts, and how well
    /// is seen from how the first half predicts it.
    pub fn new(past: &[Impression], users: usize, days: i64) -> Self {
        let mut halves = [vec![UserDay::default(); users], vec![UserDay::default(); users]];
        let middle_ms = START_MS + days * DAY_MS / 2;
        let pages = past.chunk_by(|a, b| a.request == b.request);
        for rows in pages.filter(|rows| rows[0].surface == 0) {
            let half = usize::from(rows[0].time_ms >= middle_ms);
            add(&mut halves[half][rows[0].user as usize - 1], rows);
        }
        let mut returns = UserDay::default();
        for half in &mut halves {
            for metric in 0..OF_DAY {
                let mean = half.iter().map(|of| of[metric]).sum::<f64>() / users as f64;
                for of in half.iter_mut() {
                    of[metric] = (of[metric] - mean) / (days as f64 / 2.0);
                }
            }
        }
        for (metric, share) in returns.iter_mut().enumerate() {
            let product = |a: &[UserDay], b: &[UserDay]| -> f64 {
                a.iter().zip(b).map(|(a, b)| a[metric] * b[metric]).sum()
            };
            let square = product(&halves[0], &halves[0]);
            *share = if square > 0.0 { product(&halves[0], &halves[1]) / square } else { 0.0 };
        }
        let [_, of_users] = halves;
        Self { of_users, returns }
    }
}

/// Counts what users do, a day at a time.
#[derive(Debug)]
pub struct DailyOutcomes {
    seed: u64,
    /// The arm of each user.
    arms: Vec<usize>,
    baseline: UserBaseline,
    today: Vec<UserDay>,
}

impl DailyOutcomes {
    /// Users in the arms that they have.
    pub fn new(seed: u64, arms: Vec<usize>, baseline: UserBaseline) -> Self {
        let today = vec![UserDay::default(); arms.len()];
        Self { seed, arms, baseline, today }
    }

    /// The arm of a user.
    pub fn arm(&self, user: u64) -> usize {
        self.arms[user as usize - 1]
    }

    /// A page of the surface that is tested, as it was seen. What is of items is counted at once.
    pub fn page(
        &mut self,
        rows: &[Impression],
        is_fresh: impl Fn(u64) -> bool,
        totals: &mut [&mut ArmTotals],
    ) {
        let user = rows[0].user;
        add(&mut self.today[user as usize - 1], rows);
        let (arm, key) = (self.arm(user), self.key(user));
        for row in rows {
            let fresh = f64::from(u8::from(is_fresh(row.item)));
            for totals in totals.iter_mut() {
                totals.push(arm, VALUE_SHOWN, key, value(row));
                totals.push(arm, FRESH_SHOWN, key, fresh);
                if done(row, 0) == 1.0 {
                    totals.push(arm, FRESH_CLICKS, key, fresh);
                }
            }
        }
    }

    /// Counts the day of every user.
    pub fn end_day(&mut self, totals: &mut [&mut ArmTotals]) {
        let today = std::mem::take(&mut self.today);
        let UserBaseline { of_users, returns } = &self.baseline;
        for (user, (day, before)) in today.iter().zip(of_users).enumerate() {
            let (arm, key) = (self.arms[user], self.key(user as u64 + 1));
            for metric in 0..OF_DAY {
                let outcome = day[metric] - returns[metric] * before[metric];
                totals.iter_mut().for_each(|totals| totals.push(arm, metric, key, outcome));
            }
        }
        self.today = vec![UserDay::default(); today.len()];
    }

    /// A user among those of all seeds.
    fn key(&self, user: u64) -> u64 {
        mix_parts(&[self.seed, user])
    }
}

/// Adds a page to the day of its user.
fn add(day: &mut UserDay, rows: &[Impression]) {
    day[0] += rows.iter().map(value).sum::<f64>();
    day[1] += rows.iter().map(|row| done(row, 0)).sum::<f64>();
    day[2] += 1.0;
}

fn value(row: &Impression) -> f64 {
    ACTION_VALUES.iter().enumerate().map(|(action, worth)| worth * done(row, action)).sum()
}

/// 1 if an action was done, else 0.
fn done(row: &Impression, action: usize) -> f64 {
    f64::from(u8::from(row.outcome.actions >> action & 1 == 1))
}

#[cfg(test)]
mod tests {
    use hypercast_data::dataset::ContextFeatures;
    use hypercast_fm::example::Outcome;

    use super::*;

    const USERS: u64 = 600;

    /// A page of a user on a day, with so many clicks.
    fn page(user: u64, day: i64, clicks: u64) -> Vec<Impression> {
        let row = |item: u64| Impression {
            request: user * 1000 + day as u64,
            time_ms: START_MS + day * DAY_MS,
            outcome_ms: START_MS + day * DAY_MS,
            user,
            item,
            surface: 0,
            outcome: Outcome { actions: u64::from(item < clicks), known: 7, ..Outcome::UNKNOWN },
            context: ContextFeatures::default(),
            truth: Vec::new(),
            history_only: false,
        };
        (0..20).map(row).collect()
    }

    /// The difference in clicks of users who differ much, where the second arm's click twice more.
    fn clicks(knows_the_past: bool) -> SequentialDifference {
        let usual =
            |user: u64, day: i64| mix_parts(&[user]) % 16 + mix_parts(&[user, day as u64]) % 2;
        let arms: Vec<usize> =
            (1..=USERS).map(|user| (mix_parts(&[user, 1 << 40]) % 2) as usize).collect();
        let of_past = |user| (0..4).flat_map(move |day| page(user, day, usual(user, day)));
        let past: Vec<Impression> = match knows_the_past {
            true => (1..=USERS).flat_map(of_past).collect(),
            false => Vec::new(),
        };
        let baseline = UserBaseline::new(&past, USERS as usize, 4);
        let mut outcomes = DailyOutcomes::new(1, arms, baseline);
        let mut totals = ArmTotals::new(2);
        for day in 4..8 {
            for user in 1..=USERS {
                let more = 2 * outcomes.arm(user) as u64;
                let rows = page(user, day, usual(user, day) + more);
                outcomes.page(&rows, |item| item % 2 == 0, &mut [&mut totals]);
            }
            outcomes.end_day(&mut [&mut totals]);
        }
        let rows = totals.rows("1", &["a", "b"]);
        let fresh = rows.iter().find(|row| row.metric == METRICS[FRESH_SHOWN]).unwrap();
        assert_eq!(fresh.mean, Some(0.5));
        totals.difference(1, 1, 0).unwrap()
    }

    #[test]
    fn what_users_did_before_narrows_the_interval_and_shifts_no_arm() {
        let (raw, adjusted) = (clicks(false), clicks(true));
        assert!((adjusted.difference - 2.0).abs() < 0.1, "{adjusted:?}");
        let width = |of: SequentialDifference| of.high - of.low;
        assert!(width(adjusted) < 0.3 * width(raw), "{adjusted:?} {raw:?}");
        assert!(raw.low < 2.0 && raw.high > 2.0, "{raw:?}");
    }
}
