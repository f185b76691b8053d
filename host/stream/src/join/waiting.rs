//! What a joiner keeps besides pending requests: the open windows of impressions, the actions that
//! came before their impression, and the impressions that it has seen.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

use hypercast_core::hash::IdHashKey;
use serde::{Deserialize, Serialize};

use super::{delays::OutcomeDelays, pending::ImpressionSlot};
use crate::events::ActionEvent;

/// What an impression waits for: the unknown actions (one bit each) of its surface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct AwaitedActions {
    pub(super) surface: u16,
    pub(super) actions: u64,
}

/// The impressions whose windows are open.
///
/// Impressions that wait for the same actions on the same surface have windows of the same length,
/// so each such queue closes in the order of impression times, however the length changes.
#[derive(Debug, Default)]
pub(super) struct OpenWindows {
    /// No queue is empty.
    queues: BTreeMap<AwaitedActions, BTreeSet<(i64, ImpressionSlot)>>,
}

impl OpenWindows {
    /// Opens a window, unless there is nothing to wait for.
    pub(super) fn insert(&mut self, awaited: AwaitedActions, time_ms: i64, slot: ImpressionSlot) {
        if awaited.actions != 0 {
            self.queues.entry(awaited).or_default().insert((time_ms, slot));
        }
    }

    pub(super) fn remove(&mut self, awaited: AwaitedActions, time_ms: i64, slot: ImpressionSlot) {
        if let Some(queue) = self.queues.get_mut(&awaited) {
            queue.remove(&(time_ms, slot));
            if queue.is_empty() {
                self.queues.remove(&awaited);
            }
        }
    }

    /// Removes the impressions whose windows are over and returns them in the order of time.
    pub(super) fn close_due(
        &mut self,
        now_ms: i64,
        delays: &OutcomeDelays,
    ) -> Vec<(i64, ImpressionSlot)> {
        let mut due = Vec::new();
        self.queues.retain(|&AwaitedActions { surface, actions }, queue| {
            let shown_by = now_ms.saturating_sub(delays.window_ms(surface, actions));
            while queue.first().is_some_and(|&(time_ms, _)| time_ms <= shown_by) {
                due.extend(queue.pop_first());
            }
            !queue.is_empty()
        });
        due.sort_unstable();
        due
    }
}

/// The keys of impressions that were seen: at least the last `capacity`, at most twice as many.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct SeenImpressions {
    recent: HashSet<u64, IdHashKey>,
    older: HashSet<u64, IdHashKey>,
}

impl SeenImpressions {
    pub(super) fn contains(&self, key: u64) -> bool {
        self.recent.contains(&key) || self.older.contains(&key)
    }

    pub(super) fn insert(&mut self, key: u64, capacity: usize) {
        if self.recent.len() >= capacity {
            self.older = std::mem::take(&mut self.recent);
        }
        self.recent.insert(key);
    }
}

/// An action that came before its impression.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct OrphanAction {
    pub(super) action: ActionEvent,
    pub(super) ingested_ms: i64,
    /// The joiner's clock when the action came.
    pub(super) came_ms: i64,
}

/// The actions whose impression has not come. The oldest are dropped first.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct OrphanActions {
    /// The actions of an impression in the order they came. Serialised as a sequence.
    by_key: HashMap<u64, VecDeque<OrphanAction>, IdHashKey>,
    /// Clock and key of each action in the order they came; an entry whose actions are gone is
    /// skipped.
    order: VecDeque<(i64, u64)>,
    pub(super) len: usize,
}

impl OrphanActions {
    pub(super) fn insert(&mut self, key: u64, orphan: OrphanAction) {
        self.order.push_back((orphan.came_ms, key));
        self.by_key.entry(key).or_default().push_back(orphan);
        self.len += 1;
    }

    /// Removes and returns the actions of an impression that has come, in the order they came.
    pub(super) fn take(&mut self, key: u64) -> VecDeque<OrphanAction> {
        let found = self.by_key.remove(&key).unwrap_or_default();
        self.len -= found.len();
        found
    }

    /// Drops the actions that came before a time, and the oldest beyond a number; returns how many.
    pub(super) fn forget(&mut self, before_ms: i64, capacity: usize) -> u64 {
        let mut dropped = 0;
        while let Some(&(came_ms, key)) = self.order.front() {
            // `order` also has entries of actions that were taken; they must not pile up.
            let crowded = self.len > capacity || self.order.len() > 2 * capacity + 2;
            if came_ms >= before_ms && !crowded {
                break;
            }
            self.order.pop_front();
            let Some(orphans) = self.by_key.get_mut(&key) else { continue };
            if orphans.pop_front_if(|orphan| orphan.came_ms <= came_ms).is_some() {
                self.len -= 1;
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

    fn orphan(item: u64) -> OrphanAction {
        let outcome = example::Outcome::UNKNOWN;
        let action = ActionEvent { request: 1, item, time_ms: 0, outcome, complete: false };
        OrphanAction { action, ingested_ms: 0, came_ms: item as i64 }
    }

    #[test]
    fn the_last_seen_keys_are_known_and_memory_is_bounded() {
        let mut seen = SeenImpressions::default();
        for key in 0..1000 {
            seen.insert(key, 100);
            assert!((key.saturating_sub(99)..=key).all(|key| seen.contains(key)));
            assert!(seen.recent.len() + seen.older.len() <= 200);
        }
        assert!(!seen.contains(700));
    }

    #[test]
    fn orphans_find_their_impression_or_are_dropped_and_counted() {
        let mut orphans = OrphanActions::default();
        for item in 0..10 {
            orphans.insert(item % 5, orphan(item));
        }
        let items: Vec<u64> = orphans.take(3).iter().map(|o| o.action.item).collect();
        assert_eq!(items, [3, 8], "in the order they came");
        assert_eq!((orphans.len, orphans.take(3).len()), (8, 0));
        assert_eq!(orphans.forget(2, 100), 2, "those of times 0 and 1");
        assert_eq!(orphans.forget(0, 4), 2, "beyond four");
        assert_eq!(orphans.len, 4);
        assert_eq!(orphans.forget(100, 100), 4);
        assert!(orphans.by_key.is_empty() && orphans.order.is_empty());
    }

    /// The layout of saved states: vectors in place of queues.
    #[derive(Deserialize)]
    struct SavedOrphans {
        by_key: HashMap<u64, Vec<OrphanAction>>,
        order: Vec<(i64, u64)>,
        len: usize,
    }

    #[test]
    fn orphans_of_one_impression_are_dropped_in_linear_time_and_keep_the_saved_layout() {
        let mut orphans = OrphanActions::default();
        let count = 200_000;
        for item in 0..count {
            orphans.insert(1, orphan(item));
        }
        let saved = postcard::to_allocvec(&orphans).unwrap();
        let layout: SavedOrphans = postcard::from_bytes(&saved).unwrap();
        assert_eq!(layout.by_key[&1].len() as u64, count);
        assert_eq!((layout.order.len() as u64, layout.len as u64), (count, count));
        assert_eq!(orphans.forget(i64::MAX, usize::MAX / 4), count);
        assert_eq!(orphans.len, 0);
    }
}
