//! Tests of equal arms: how often a difference is found where there is none.
//!
//! The rankers of the world itself stand in for models, in this process: what is tested here is
//! whether users, who come again and again and change what is popular for all, are counted as they
//! vary. Somebody looks at the end of each day.

use hypercast_core::{hash::mix_parts, progress::Progress};
use serde_json::json;

use super::{
    outcomes::{ArmTotals, DailyOutcomes, METRICS, UserBaseline},
    world::{ClosedLoopOptions, ClosedLoopWorld, DAY_MS, PageRequest, START_MS},
};
use crate::error::Result;

/// Tests of equal arms.
pub const RUNS: u64 = 100;

/// The p-value below which arms differ.
const SIGNIFICANT: f64 = 0.05;

/// Pages that are ranked together at most.
const TOGETHER: usize = 8;

/// The size of a test.
#[derive(Debug, Clone, Copy)]
pub struct TestSize {
    /// Users of both arms.
    pub users: usize,
    /// Days before the test, and as many of it.
    pub days: i64,
}

/// In how many of `runs` tests some day's look found a difference, by metric. `rank` orders a page
/// of a user in an arm.
pub fn found(
    runs: u64,
    size: TestSize,
    rank: impl Fn(&mut ClosedLoopWorld, &PageRequest, usize) -> Vec<u64>,
) -> Result<[u64; METRICS.len()]> {
    let mut found = [0; METRICS.len()];
    let mut progress = Progress::start("tests of two arms", runs);
    for seed in 0..runs {
        let was_found = differs(seed, size, &rank)?;
        (0..METRICS.len()).for_each(|metric| found[metric] += u64::from(was_found[metric]));
        progress.advance(1, || format!("{found:?} found a difference"));
    }
    progress.finish(&format!("{found:?} found a difference"));
    Ok(found)
}

/// Whether a look found a difference, by metric.
fn differs(
    seed: u64,
    size: TestSize,
    rank: impl Fn(&mut ClosedLoopWorld, &PageRequest, usize) -> Vec<u64>,
) -> Result<[bool; METRICS.len()]> {
    let TestSize { users, days } = size;
    let options = ClosedLoopOptions { users, items: 400, items_per_day: 40, seed };
    let mut world = ClosedLoopWorld::new(options)?;
    let past = world.past(days)?;
    let first = past.chunk_by(|a, b| a.request == b.request).filter(|rows| rows[0].surface == 0);
    let baseline = UserBaseline::new(first, users, START_MS, days);
    let arms = (0..users as u64).map(|user| (mix_parts(&[seed, user]) & 1) as usize).collect();
    let mut outcomes = DailyOutcomes::new(seed, arms, baseline);
    let mut totals = ArmTotals::new(2);
    let mut found = [false; METRICS.len()];
    for day in 0..days {
        let until_ms = START_MS + (days + day + 1) * DAY_MS;
        loop {
            let pages = world.next_pages(until_ms, TOGETHER);
            if pages.is_empty() {
                break;
            }
            for page in pages {
                if page.surface != 0 {
                    world.show_by_popularity(&page)?;
                    continue;
                }
                let ranking = rank(&mut world, &page, outcomes.arm(page.user));
                let rows = world.show(&page, &ranking)?;
                let is_fresh = |item| world.is_fresh(item, page.time_ms);
                outcomes.page(&rows, is_fresh, &mut [&mut totals]);
            }
        }
        outcomes.end_day(&mut [&mut totals]);
        for (metric, found) in found.iter_mut().enumerate() {
            *found |= totals.difference(metric, 1, 0).is_some_and(|of| of.p < SIGNIFICANT);
        }
    }
    Ok(found)
}

/// Runs the tests; the text and the rows of a report.
pub fn run(size: TestSize) -> Result<(String, Vec<serde_json::Value>)> {
    let found = found(RUNS, size, |world, page, _| world.rank_by_popularity(page))?;
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

    const SMALL: TestSize = TestSize { users: 260, days: 3 };

    #[test]
    fn equal_arms_seldom_differ_and_better_ones_do() {
        let equal = found(25, SMALL, |world, page, _| world.rank_by_popularity(page)).unwrap();
        assert!(equal.iter().all(|found| *found <= 2), "{equal:?} of 25");
        let better = |world: &mut ClosedLoopWorld, page: &PageRequest, arm: usize| match arm {
            0 => world.rank_by_popularity(page),
            _ => world.rank_by_truth(page),
        };
        let [value, clicks, ..] = found(2, TestSize { users: 500, days: 5 }, better).unwrap();
        assert_eq!((value, clicks), (2, 2));
    }
}
