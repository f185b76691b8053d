//! What a joiner remembers beside the impressions it holds, in bounds: which
//! impressions there were, and actions whose impression has not come.

use std::collections::{HashMap, HashSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::ingest::Reaction;

/// Keys that were seen: the last `capacity` at least, twice as many at most.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Seen {
    young: HashSet<u64>,
    old: HashSet<u64>,
}

impl Seen {
    pub(super) fn contains(&self, key: u64) -> bool {
        self.young.contains(&key) || self.old.contains(&key)
    }

    pub(super) fn insert(&mut self, key: u64, capacity: usize) {
        if self.young.len() >= capacity {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key);
    }
}

/// An action that came before its impression.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Orphan {
    pub(super) reaction: Reaction,
    pub(super) ingested_ms: i64,
    /// The joiner's clock when it came.
    came_ms: i64,
}

/// Actions whose impression has not come, oldest first to go.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Orphans {
    by_key: HashMap<u64, Vec<Orphan>>,
    /// In the order they came; keys whose orphans are gone are passed over.
    order: VecDeque<(i64, u64)>,
    held: usize,
}

impl Orphans {
    pub(super) fn len(&self) -> usize {
        self.held
    }

    pub(super) fn insert(
        &mut self,
        key: u64,
        reaction: Reaction,
        (ingested_ms, now_ms): (i64, i64),
    ) {
        let orphan = Orphan { reaction, ingested_ms, came_ms: now_ms };
        self.by_key.entry(key).or_default().push(orphan);
        self.order.push_back((now_ms, key));
        self.held += 1;
    }

    /// The actions of an impression that has come, in the order they came.
    pub(super) fn take(&mut self, key: u64) -> Vec<Orphan> {
        let found = self.by_key.remove(&key).unwrap_or_default();
        self.held -= found.len();
        found
    }

    /// Lets go of those that came before a time, and of the oldest beyond a number. How many they were.
    pub(super) fn forget(&mut self, before_ms: i64, most: usize) -> u64 {
        let mut dropped = 0;
        while let Some(&(came_ms, key)) = self.order.front() {
            // The order also has places of orphans that found their impression, which must not pile up.
            let crowded = self.held > most || self.order.len() > 2 * most + 2;
            if came_ms >= before_ms && !crowded {
                break;
            }
            self.order.pop_front();
            let Some(orphans) = self.by_key.get_mut(&key) else { continue };
            if orphans.first().is_some_and(|orphan| orphan.came_ms <= came_ms) {
                orphans.remove(0);
                self.held -= 1;
                dropped += 1;
            }
            if orphans.is_empty() {
                self.by_key.remove(&key);
            }
        }
        dropped
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example;

    use super::*;

    fn reaction(item: u64) -> Reaction {
        let outcome = example::Outcome::UNKNOWN;
        Reaction { request: 1, item, time_ms: 0, outcome, complete: false }
    }

    #[test]
    fn what_was_seen_last_is_known_and_memory_is_bounded() {
        let mut seen = Seen::default();
        for key in 0..1000 {
            seen.insert(key, 100);
            assert!((key.saturating_sub(99)..=key).all(|key| seen.contains(key)));
            assert!(seen.young.len() + seen.old.len() <= 200);
        }
        assert!(!seen.contains(700));
    }

    #[test]
    fn orphans_find_their_impression_or_are_dropped_and_counted() {
        let mut orphans = Orphans::default();
        for item in 0..10 {
            orphans.insert(item % 5, reaction(item), (0, item as i64));
        }
        let items: Vec<u64> = orphans.take(3).iter().map(|o| o.reaction.item).collect();
        assert_eq!(items, [3, 8], "in the order they came");
        assert_eq!((orphans.len(), orphans.take(3).len()), (8, 0));
        assert_eq!(orphans.forget(2, 100), 2, "those of times 0 and 1");
        assert_eq!(orphans.forget(0, 4), 2, "beyond four");
        assert_eq!(orphans.len(), 4);
        assert_eq!(orphans.forget(100, 100), 4);
        assert!(orphans.by_key.is_empty() && orphans.order.is_empty());
    }
}
