//! Maps by 64-bit id. A request looks up hundreds of ids, so a hash costs a few multiplications.
//!
//! Ids come from callers. Each map mixes a random key into them, so that nobody can choose ids that
//! collide.

use std::collections::HashMap;

use hypercast_core::hash::IdHashKey;

/// A map without a bound.
pub(super) type IdMap<V> = HashMap<u64, V, IdHashKey>;

/// A map of bounded size that drops the entries touched longest ago. It has no clock: callers pass
/// the time.
pub(super) struct RecencyMap<V> {
    /// The time of the last touch, and the value.
    entries: IdMap<(i64, V)>,
    capacity: usize,
}

impl<V: Default> RecencyMap<V> {
    /// An empty map of at most `capacity` entries, at least one.
    pub(super) fn new(capacity: usize) -> RecencyMap<V> {
        RecencyMap { entries: IdMap::default(), capacity: capacity.max(1) }
    }

    pub(super) fn get(&self, id: u64) -> Option<&V> {
        self.entries.get(&id).map(|(_, value)| value)
    }

    /// A mutable value, without touching it.
    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut V> {
        self.entries.get_mut(&id).map(|(_, value)| value)
    }

    /// A value and the time of its last touch.
    pub(super) fn get_with_time(&self, id: u64) -> Option<(i64, &V)> {
        self.entries.get(&id).map(|(last_ms, value)| (*last_ms, value))
    }

    /// Ids, times of the last touch and values, in no particular order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, i64, &V)> {
        self.entries.iter().map(|(&id, (last_ms, value))| (id, *last_ms, value))
    }

    /// Restores an entry that `iter` returned.
    pub(super) fn put(&mut self, id: u64, last_ms: i64, value: V) {
        self.entries.insert(id, (last_ms, value));
    }

    /// A mutable value, which is created if it does not exist, and the time of its previous touch.
    pub(super) fn touch(&mut self, id: u64, now_ms: i64) -> (i64, &mut V) {
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&id) {
            self.drop_oldest();
        }
        let (last_ms, value) = self.entries.entry(id).or_insert_with(|| (now_ms, V::default()));
        let before = *last_ms;
        *last_ms = before.max(now_ms);
        (before, value)
    }

    /// Drops the oldest quarter at once, so that a full map pays for this once in many touches.
    fn drop_oldest(&mut self) {
        let mut times: Vec<i64> = self.entries.values().map(|(last_ms, _)| *last_ms).collect();
        let quarter = times.len() / 4;
        let (_, &mut cutoff, _) = times.select_nth_unstable(quarter);
        self.entries.retain(|_, (last_ms, _)| *last_ms > cutoff);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_are_forgotten_and_the_bound_holds() {
        let mut map: RecencyMap<u32> = RecencyMap::new(100);
        for id in 0..1000 {
            *map.touch(id, id as i64).1 += 1;
            map.touch(0, id as i64);
            assert!(map.entries.len() <= 100);
        }
        assert_eq!(map.get(0), Some(&1), "touched all along");
        assert_eq!(map.get(999), Some(&1));
        assert_eq!(map.get(500), None);
        assert_eq!(map.touch(999, 2000).0, 999);
    }
}
