//! A map of bounded size that forgets what was not touched for longest. It has
//! no clock: the caller says when.

use super::ids::IdMap;

/// Values by id, each with the time of its last touch.
pub(super) struct Recent<V> {
    entries: IdMap<(i64, V)>,
    capacity: usize,
}

impl<V: Default> Recent<V> {
    /// An empty map of at most `capacity` entries.
    pub(super) fn new(capacity: usize) -> Recent<V> {
        Recent { entries: IdMap::default(), capacity: capacity.max(1) }
    }

    /// The number of entries.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// A value.
    pub(super) fn get(&self, id: u64) -> Option<&V> {
        self.entries.get(&id).map(|(_, value)| value)
    }

    /// A value to change, which does not touch it.
    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut V> {
        self.entries.get_mut(&id).map(|(_, value)| value)
    }

    /// All values, each with its id and the time of its last touch, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, i64, &V)> {
        self.entries.iter().map(|(&id, (last_ms, value))| (id, *last_ms, value))
    }

    /// Puts back what `iter` gave.
    pub(super) fn put(&mut self, id: u64, last_ms: i64, value: V) {
        self.entries.insert(id, (last_ms, value));
    }

    /// A value and when it was last touched.
    pub(super) fn get_with_time(&self, id: u64) -> Option<(i64, &V)> {
        self.entries.get(&id).map(|(last_ms, value)| (*last_ms, value))
    }

    /// A value to change, made if need be, and the time of the touch before this one.
    pub(super) fn touch(&mut self, id: u64, now_ms: i64) -> (i64, &mut V) {
        if self.entries.len() >= self.capacity && !self.entries.contains_key(&id) {
            self.forget();
        }
        let (last_ms, value) = self.entries.entry(id).or_insert_with(|| (now_ms, V::default()));
        let before = *last_ms;
        *last_ms = before.max(now_ms);
        (before, value)
    }

    /// Drops the oldest quarter at once, so that a full map pays for it once in many touches.
    fn forget(&mut self) {
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
        let mut map: Recent<u32> = Recent::new(100);
        for id in 0..1000 {
            *map.touch(id, id as i64).1 += 1;
            map.touch(0, id as i64);
            assert!(map.len() <= 100);
        }
        assert_eq!(map.get(0), Some(&1), "touched all along");
        assert_eq!(map.get(999), Some(&1));
        assert_eq!(map.get(500), None);
        assert_eq!(map.touch(999, 2000).0, 999);
    }
}
