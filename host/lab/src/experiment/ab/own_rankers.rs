//! The world's own rankers in place of models, in this process: what the ranker of the past and the
//! truth itself would earn, and how often equal arms are found to differ.
//!
//! What the latter tests is whether users, who come again and again and change what is popular for
//! all, are counted as they vary. Somebody looks at the end of each day.

use hypercast_core::{hash::mix_parts, progress::Progress, shutdown::Shutdown};
use serde_json::json;

use super::{
    check_stop,
    outcomes::{ArmTotals, DailyOutcomes, FEWEST_USERS, METRICS, UserBaseline},
    world::{ClosedLoopOptions, ClosedLoopWorld, DAY_MS, PageRequest, START_MS},
};
use crate::error::{CommonErrors as _, Error, Result};

/// Tests of equal arms, whose seeds count from 0.
pub const RUNS: u64 = 100;

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

/// What the looks at the end of the days said of one metric, over tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LookFindings {
    /// Tests in which enough was known at some look to say anything.
    known: u64,
    /// Those of them in which a look found a difference.
    found: u64,
}

/// The findings of `runs` tests by metric.
fn findings(
    runs: u64,
    size: TestSize,
    rank: RankBy<'_>,
    stop: &Shutdown,
) -> Result<[LookFindings; METRICS.len()]> {
    let mut all = [LookFindings::default(); METRICS.len()];
    let mut progress = Progress::start("tests of two arms", runs);
    let text = |all: &[LookFindings]| {
        let each: Vec<_> = all.iter().map(|of| format!("{} of {}", of.found, of.known)).collect();
        format!("a difference was found in {}", each.join(", "))
    };
    for seed in 0..runs {
        for (all, of) in all.iter_mut().zip(look_at(seed, size, rank, stop)?) {
            all.known += of.known;
            all.found += of.found;
        }
        progress.advance(1, || text(&all));
    }
    progress.finish(&text(&all));
    Ok(all)
}

/// The findings of one test.
fn look_at(
    seed: u64,
    size: TestSize,
    rank: RankBy<'_>,
    stop: &Shutdown,
) -> Result<[LookFindings; METRICS.len()]> {
    let world = ClosedLoopOptions { users: size.users, items: 400, items_per_day: 40, seed };
    let arm = |user: u64| (mix_parts(&[seed, user]) & 1) as usize;
    let arms = (0..size.users as u64).map(arm).collect();
    let mut totals = ArmTotals::new(2);
    let mut findings = [LookFindings::default(); METRICS.len()];
    OwnRankerTest { world, size, arms, rank, stop }.run(&mut [&mut totals], |totals| {
        for (metric, of) in findings.iter_mut().enumerate() {
            if let Some(difference) = totals[0].difference(metric, 1, 0) {
                of.known = 1;
                of.found |= u64::from(difference.p < SIGNIFICANT);
            }
        }
    })?;
    Ok(findings)
}

/// What the world would see under a ranker by popularity and under the truth, if each had all
/// users.
pub fn references(
    world: &ClosedLoopOptions,
    size: TestSize,
    totals: &mut [&mut ArmTotals],
    stop: &Shutdown,
) -> Result<()> {
    for arm in 0..REFERENCES.len() {
        let arms = vec![arm; size.users];
        let test =
            OwnRankerTest { world: world.clone(), size, arms, rank: &popularity_or_truth, stop };
        test.run(totals, |_| ())?;
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
    stop: &'a Shutdown,
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
                check_stop(self.stop)?;
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
///
/// # Errors
/// A size at which nothing can be said of some metric.
pub fn test_equal_arms(
    size: TestSize,
    stop: &Shutdown,
) -> Result<(String, Vec<serde_json::Value>)> {
    let TestSize { users, days, .. } = size;
    let too_few = |of: &str| {
        Error::invalid(format!(
            "--ab-users {users}, --ab-days {days}: nothing can be said of {of}; there must be \
             {FEWEST_USERS} users in each of the two arms that have something to count"
        ))
    };
    if users < 2 * FEWEST_USERS {
        return Err(too_few("any metric"));
    }
    let findings = findings(RUNS, size, &by_popularity, stop)?;
    let mut text = format!("equal arms that differ (p < {SIGNIFICANT} at the end of some day)\n");
    let mut rows = Vec::new();
    for (metric, LookFindings { known, found }) in METRICS.into_iter().zip(findings) {
        if known == 0 {
            return Err(too_few(&format!("the {metric}")));
        }
        text += &format!("{metric}: {found} of {known}\n");
        rows.push(json!({ "metric": metric, "runs": RUNS, "known": known, "found": found }));
    }
    Ok((text, rows))
}

fn popularity_or_truth(world: &mut ClosedLoopWorld, page: &PageRequest, arm: usize) -> Vec<u64> {
    if arm == 0 { world.rank_by_popularity(page) } else { world.rank_by_truth(page) }
}

fn by_popularity(world: &mut ClosedLoopWorld, page: &PageRequest, _: usize) -> Vec<u64> {
    world.rank_by_popularity(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_arms_seldom_differ_and_better_ones_do() {
        let stop = Shutdown::default();
        let size = TestSize { users: 420, past_days: 2, days: 3 };
        let equal = findings(25, size, &by_popularity, &stop).unwrap();
        assert!(equal.iter().all(|of| of.known > 20 && of.found <= 2), "{equal:?} of 25");
        let size = TestSize { users: 500, past_days: 4, days: 5 };
        let [value, clicks, ..] = findings(2, size, &popularity_or_truth, &stop).unwrap();
        let both = LookFindings { known: 2, found: 2 };
        assert_eq!((value, clicks), (both, both));
    }

    #[test]
    fn of_too_few_users_nothing_is_known() {
        let size = TestSize { users: 90, past_days: 2, days: 2 };
        let few = findings(1, size, &by_popularity, &Shutdown::default()).unwrap();
        assert_eq!(few, [LookFindings::default(); METRICS.len()]);
    }

    #[test]
    fn a_stop_ends_the_tests() {
        let stop = Shutdown::default();
        stop.request();
        let size = TestSize { users: 300, past_days: 2, days: 1 };
        let message = test_equal_arms(size, &stop).unwrap_err().to_string();
        assert!(message.contains("stopped"), "{message}");
    }
}
