//! What a page is ranked from: popular items, items like those that the user clicked, fresh ones,
//! and a few by chance.

use std::collections::BTreeMap;

use rand::{Rng, rngs::SmallRng};

use super::{
    DAY_MS, FRESH_MS,
    entities::{LoopCodes, LoopItem, LoopUser},
};

/// Candidates from each source, in this order: popular, personal, fresh, and by chance.
const POPULAR: usize = 8;
const PERSONAL: usize = 8;
const FRESH: usize = 6;
const BY_CHANCE: usize = 2;
/// Popular candidates are drawn from so many.
const MOST_POPULAR: usize = 48;
/// What is popular is counted anew each hour.
pub(super) const POPULAR_EVERY_MS: i64 = 60 * 60_000;
/// After this time a click counts half for popularity.
const CLICK_HALF_LIFE_MS: f32 = 2.0 * DAY_MS as f32;
/// Draws before a source gives up: what it has was taken, or seen in the session.
const ATTEMPTS: usize = 4;

/// The released items, by what they are retrieved by.
#[derive(Default)]
pub(super) struct RetrievalIndex {
    by_topic: BTreeMap<u64, Vec<usize>>,
    by_creator: BTreeMap<u64, Vec<usize>>,
    clicks: Vec<RecentClicks>,
    /// The clicks of each item when they were counted last, and the most popular by them.
    counted: Vec<f32>,
    popular: Vec<usize>,
    counted_ms: i64,
}

/// Clicks of an item, each of which counts less with time.
#[derive(Debug, Clone, Copy, Default)]
struct RecentClicks {
    count: f32,
    time_ms: i64,
}

impl RecentClicks {
    fn at(self, time_ms: i64) -> f32 {
        self.count * (-(time_ms - self.time_ms) as f32 / CLICK_HALF_LIFE_MS).exp2()
    }
}

impl RetrievalIndex {
    /// Items are released in the order of their places.
    pub(super) fn release(&mut self, item: usize, codes: LoopCodes) {
        self.by_topic.entry(codes.shown_topic).or_default().push(item);
        self.by_creator.entry(codes.creator).or_default().push(item);
        self.clicks.push(RecentClicks::default());
    }

    pub(super) fn clicked(&mut self, item: usize, time_ms: i64) {
        let count = self.clicks[item].at(time_ms) + 1.0;
        self.clicks[item] = RecentClicks { count, time_ms };
    }

    /// Clicks of late, as they were counted last.
    pub(super) fn counted(&self, item: usize) -> f32 {
        self.counted.get(item).copied().unwrap_or(0.0)
    }

    /// Counts what is popular if that is due.
    pub(super) fn count(&mut self, time_ms: i64) {
        if time_ms / POPULAR_EVERY_MS == self.counted_ms / POPULAR_EVERY_MS {
            return;
        }
        self.counted_ms = time_ms;
        self.counted = self.clicks.iter().map(|clicks| clicks.at(time_ms)).collect();
        let mut popular: Vec<usize> = (0..self.counted.len()).collect();
        popular.sort_by(|a, b| self.counted[*b].total_cmp(&self.counted[*a]));
        popular.truncate(MOST_POPULAR);
        self.popular = popular;
    }

    /// The candidates of a page; none was shown in the session.
    pub(super) fn candidates(
        &self,
        user: &LoopUser,
        items: &[LoopItem],
        time_ms: i64,
        rng: &mut SmallRng,
    ) -> Vec<usize> {
        let first_fresh = items.partition_point(|item| time_ms - item.release_ms >= FRESH_MS);
        let mut chosen: Vec<usize> = Vec::new();
        let mut take = |count: usize, draw: &mut dyn FnMut(&mut SmallRng) -> Option<usize>| {
            let until = chosen.len() + count;
            for _ in 0..count * ATTEMPTS {
                if chosen.len() == until {
                    break;
                }
                let drawn = draw(rng).filter(|item| !user.seen.contains(item));
                if let Some(item) = drawn.filter(|item| !chosen.contains(item)) {
                    chosen.push(item);
                }
            }
        };
        let any = |from: &[usize], rng: &mut SmallRng| {
            (!from.is_empty()).then(|| from[rng.random_range(0..from.len())])
        };
        take(POPULAR, &mut |rng| any(&self.popular, rng));
        take(PERSONAL, &mut |rng| {
            let LoopCodes { shown_topic, creator } = items[any(&user.clicks, rng)?].codes;
            if rng.random() {
                any(&self.by_topic[&shown_topic], rng)
            } else {
                any(&self.by_creator[&creator], rng)
            }
        });
        take(FRESH, &mut |rng| {
            (first_fresh < items.len()).then(|| rng.random_range(first_fresh..items.len()))
        });
        take(BY_CHANCE, &mut |rng| Some(rng.random_range(0..items.len())));
        chosen
    }
}
