//! The newest record ids of a stream, so that a record that is sent again is not stored twice.
//! Positions are not remembered.

use std::collections::{HashSet, VecDeque};

/// The newest ids of a stream; at most `capacity` after [`RecentIds::settle`].
#[derive(Debug, Default)]
pub(super) struct RecentIds {
    capacity: usize,
    /// Oldest first.
    order: VecDeque<u64>,
    known: HashSet<u64>,
}

impl RecentIds {
    pub(super) fn new(capacity: usize) -> RecentIds {
        RecentIds { capacity, ..RecentIds::default() }
    }

    /// Whether to append a record with this id: always for 0, else if the id is new. Remembers the
    /// id.
    pub(super) fn admit(&mut self, id: u64) -> bool {
        if id == 0 {
            return true;
        }
        let new = self.known.insert(id);
        if new {
            self.order.push_back(id);
        }
        new
    }

    /// The number of remembered ids, to return to with [`RecentIds::undo`].
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Forgets all but the oldest `len` ids, because their records were not stored after all. Call
    /// it before [`RecentIds::settle`].
    pub(super) fn undo(&mut self, len: usize) {
        let len = len.min(self.order.len());
        for id in self.order.drain(len..) {
            self.known.remove(&id);
        }
    }

    /// Forgets the oldest ids beyond the capacity. It is separate from `admit`, so that an append
    /// that fails changes nothing.
    pub(super) fn settle(&mut self) {
        while self.order.len() > self.capacity {
            if let Some(id) = self.order.pop_front() {
                self.known.remove(&id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_ids_are_known_and_undone_ones_are_not() {
        let mut ids = RecentIds::new(3);
        assert!([1, 2, 3, 4].iter().all(|&id| ids.admit(id)));
        assert!(!ids.admit(1), "only settling forgets");
        ids.settle();
        assert!(ids.admit(1) && !ids.admit(3), "the oldest was forgotten");
        let before = ids.len();
        assert!(ids.admit(9) && ids.admit(0) && ids.admit(0));
        ids.undo(before);
        assert!(ids.admit(9) && !ids.admit(1));
    }
}
