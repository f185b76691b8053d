//! The world's own rankers in place of models, in this process: what the ranker of the past and the
//! truth itself would earn, and how often equal arms are found to differ.
//!
//! What the latter tests is whether users, who come again and again and change what is popular for
//! all, are counted as they vary. Somebody looks at the end of each day.

use hypercast_core::{hash::mix_parts, progress::Progress};
use serde_json::json;

use super::{
    outcomes::{ArmTotals, DailyOutcomes, METRICS, UserBaseline},
    world::{ClosedLoopOptions, ClosedLoopWorld, DAY_MS, PageRequest, START_MS},
};
use crate::error::Result;

/// Tests of equal arms.
const RUNS: u64 = 100;

/// The p-value below which arms differ.
const SIGNIFICANT: f64 = 0.05;

/// Rankers that are no arms of a test: they say how much there is to gain.
pub const REFERENCES: [&str; 2] = ["popularity", "truth"];

/// The size of a test.
#[derive(Debug, Clone, Copy)]
pub struct TestSize {
    /// Users of all arms.
    pub users: usize,
    /// Days before the test.
    pub past_days: i64,
    /// Days of the test.
    pub days: i64,
}

/// Orders a page's candidates for a user in an arm.
type RankBy<'a> = &'a dyn Fn(&mut ClosedLoopWorld, &PageRequest, usize) -> Vec<u64>;

/// In how many of `runs` tests some day's look found a difference, by metric.
fn found(runs: u64, size: TestSize, rank: RankBy<'_>) -> Result<[u64; METRICS.len()]> {
    let mut found = [0; METRICS.len()];
    let mut progress = Progress::start("tests of two arms", runs);
    for seed in 0..runs {
        let was_found = differs(seed, size, rank)?;
        (0..METRICS.len()).for_each(|metric| found[metric] += u64::from(was_found[metric]));
        progress.advance(1, || format!("{found:?} found a difference"));
    }
    progress.finish(&format!("{found:?} found a difference"));
    Ok(found)
}

/// Whether a look found a difference, by metric.
fn differs(seed: u64, size: TestSize, rank: RankBy<'_>) -> Result<[bool; METRICS.len()]> {
    let world = ClosedLoopOptions { users: size.users, items: 400, items_per_day: 40, seed };
    let arm = |user: u64| (mix_parts(&[seed, user]) & 1) as usize;
    let arms = (0..size.users as u64).map(arm).collect();
    let mut totals = ArmTotals::new(2);
    let mut found = [false; METRICS.len()];
    OwnRankerTest { world, size, arms, rank }.run(&mut [&mut totals], |totals| {
        for (metric, found) in found.iter_mut().enumerate() {
            *found |= totals[0].difference(metric, 1, 0).is_some_and(|of| of.p < SIGNIFICANT);
        }
    })?;
    Ok(found)
}

/// What the world would see under a ranker by popularity and under the truth, if each had all
/// users.
pub fn references(
    world: &ClosedLoopOptions,
    size: TestSize,
    totals: &mut [&mut ArmTotals],
) -> Result<()> {
    let rank = |world: &mut ClosedLoopWorld, page: &PageRequest, arm: usize| match arm {
        0 => world.rank_by_popularity(page),
        _ => world.rank_by_truth(page),
    };
    for arm in 0..REFERENCES.len() {
        let arms = vec![arm; size.users];
        OwnRankerTest { world: world.clone(), size, arms, rank: &rank }.run(totals, |_| ())?;
    }
    Ok(())
}

/// A test whose arms are rankers of the world itself.
struct OwnRankerTest<'a> {
    world: ClosedLoopOptions,
    size: TestSize,
    /// The arm of each user.
    arms: Vec<usize>,
    rank: RankBy<'a>,
}

impl OwnRankerTest<'_> {
    /// Runs its days after those before it; `look` is called at the end of each.
    fn run(
        self,
        totals: &mut [&mut ArmTotals],
        mut look: impl FnMut(&[&mut ArmTotals]),
    ) -> Result<()> {
        let (seed, TestSize { users, past_days, days }) = (self.world.seed, self.size);
        let mut world = ClosedLoopWorld::new(self.world)?;
        let past = world.past(past_days)?;
        let baseline = UserBaseline::new(&past, users, past_days);
        let mut outcomes = DailyOutcomes::new(seed, self.arms, baseline);
        for day in 1..=days {
            let until_ms = START_MS + (past_days + day) * DAY_MS;
            while let [page] = &world.next_pages(until_ms, 1)[..] {
                if page.surface != 0 {
                    world.show_by_popularity(page)?;
                    continue;
                }
                let ranking = (self.rank)(&mut world, page, outcomes.arm(page.user));
                let rows = world.show(page, &ranking)?;
                outcomes.page(&rows, |item| world.is_fresh(item, page.time_ms), totals);
            }
            outcomes.end_day(totals);
            look(totals);
        }
        Ok(())
    }
}

/// Runs tests of equal arms; the text and the rows of a report.
pub fn test_equal_arms(size: TestSize) -> Result<(String, Vec<serde_json::Value>)> {
    let found = found(RUNS, size, &|world, page, _| world.rank_by_popularity(page))?;
    let row =
        |(metric, found): (&str, u64)| json!({ "metric": metric, "runs": RUNS, "found": found });
    let rows = METRICS.into_iter().zip(found);
    let line = |(metric, found): (&str, u64)| format!("{metric}: {found} of {RUNS}\n");
    let text: String = rows.clone().map(line).collect();
    Ok((
        format!("equal arms that differ (p < {SIGNIFICANT} at the end of some day)\n{text}"),
        rows.map(row).collect(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: TestSize = TestSize { users: 260, past_days: 2, days: 3 };

    #[test]
    fn equal_arms_seldom_differ_and_better_ones_do() {
        let equal = found(25, SMALL, &|world, page, _| world.rank_by_popularity(page)).unwrap();
        assert!(equal.iter().all(|found| *found <= 2), "{equal:?} of 25");
        let better = |world: &mut ClosedLoopWorld, page: &PageRequest, arm: usize| match arm {
            0 => world.rank_by_popularity(page),
            _ => world.rank_by_truth(page),
        };
        let [value, clicks, ..] =
            found(2, TestSize { users: 500, past_days: 4, days: 5 }, &better).unwrap();
        assert_eq!((value, clicks), (2, 2));
    }
}
