//! The ids that a stream remembers: the newest so many, so that what is sent
//! again is not kept twice. It knows ids alone, not where their records are.

use std::collections::{HashSet, VecDeque};

/// The newest ids of a stream; at most `most` once an append has settled.
#[derive(Debug, Default)]
pub(super) struct Ids {
    most: usize,
    /// Oldest first.
    order: VecDeque<u64>,
    known: HashSet<u64>,
}

impl Ids {
    pub(super) fn new(most: usize) -> Ids {
        Ids { most, ..Ids::default() }
    }

    /// Whether a record with this id is to be kept; 0 always is. A new id counts as known from now on.
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

    /// How many are known: what [`Ids::undo`] goes back to.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// Forgets the newest ones, whose records were not kept after all. Only before [`Ids::settle`].
    pub(super) fn undo(&mut self, len: usize) {
        for id in self.order.drain(len..) {
            self.known.remove(&id);
        }
    }

    /// Lets go of the oldest beyond the most. It is apart from `admit` so that an append that fails changes nothing.
    pub(super) fn settle(&mut self) {
        while self.order.len() > self.most {
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
    fn the_newest_are_known_and_what_is_undone_is_not() {
        let mut ids = Ids::new(3);
        assert!([1, 2, 3, 4].iter().all(|&id| ids.admit(id)));
        assert!(!ids.admit(1), "it is let go of by settling alone");
        ids.settle();
        assert!(ids.admit(1) && !ids.admit(3), "the oldest went");
        let before = ids.len();
        assert!(ids.admit(9) && ids.admit(0) && ids.admit(0));
        ids.undo(before);
        assert!(ids.admit(9) && !ids.admit(1));
    }
}
