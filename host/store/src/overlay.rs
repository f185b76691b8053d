//! The overlay: rows that differ from the slabs, in memory. A writer's holds what
//! was changed since the last checkpoint, a reader's what the journal held when it was opened.
//! It does not know which of its rows are durable, only which are dirty.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::header::mix;

/// One row and its optimizer state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub row: u32,
    pub id: u64,
    pub state: f32,
    pub values: &'a [f32],
}

/// Rows by row number, apart from the slabs.
#[derive(Debug)]
pub(crate) struct Overlay {
    dim: usize,
    /// By row number: 1 + the row's position here, or 0.
    place: Vec<u32>,
    rows: Vec<u32>,
    ids: Vec<u64>,
    states: Vec<f32>,
    values: Vec<f32>,
    is_dirty: Vec<bool>,
    dirty: Vec<u32>,
    /// Row numbers of ids that the slabs do not have.
    new_ids: HashMap<u64, u32, BuildHasherDefault<IdHasher>>,
}

impl Overlay {
    /// An empty one for rows of `dim` values.
    pub fn new(dim: usize) -> Overlay {
        Overlay {
            dim,
            place: Vec::new(),
            rows: Vec::new(),
            ids: Vec::new(),
            states: Vec::new(),
            values: Vec::new(),
            is_dirty: Vec::new(),
            dirty: Vec::new(),
            new_ids: HashMap::default(),
        }
    }

    /// How many rows it holds.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Where a row is, if it is here.
    #[inline]
    pub fn position(&self, row: u32) -> Option<usize> {
        match self.place.get(row as usize) {
            None | Some(0) => None,
            Some(&place) => Some(place as usize - 1),
        }
    }

    /// The row number of an id that the slabs do not have.
    #[inline]
    pub fn find(&self, id: u64) -> Option<u32> {
        self.new_ids.get(&id).copied()
    }

    /// Remembers an id that the slabs do not have.
    pub fn insert_id(&mut self, id: u64, row: u32) {
        self.new_ids.insert(id, row);
    }

    /// Ids that the slabs do not have, with their row numbers.
    pub fn new_ids(&self) -> impl ExactSizeIterator<Item = (u64, u32)> + '_ {
        self.new_ids.iter().map(|(&id, &row)| (id, row))
    }

    /// Sets a row, adding it if need be; gives its position.
    pub fn put(&mut self, entry: Entry<'_>) -> usize {
        assert_eq!(entry.values.len(), self.dim);
        if let Some(at) = self.position(entry.row) {
            self.ids[at] = entry.id;
            self.states[at] = entry.state;
            self.values_mut(at).copy_from_slice(entry.values);
            return at;
        }
        self.values.extend_from_slice(entry.values);
        self.push(entry.row, entry.id, entry.state)
    }

    /// Adds a row whose values `fill` writes into zeros; gives its position.
    pub fn add(&mut self, row: u32, id: u64, state: f32, fill: impl FnOnce(&mut [f32])) -> usize {
        let start = self.values.len();
        self.values.resize(start + self.dim, 0.0);
        fill(&mut self.values[start..]);
        self.push(row, id, state)
    }

    fn push(&mut self, row: u32, id: u64, state: f32) -> usize {
        let at = self.rows.len();
        if self.place.len() <= row as usize {
            self.place.resize(row as usize + 1, 0);
        }
        self.place[row as usize] = at as u32 + 1;
        self.rows.push(row);
        self.ids.push(id);
        self.states.push(state);
        self.is_dirty.push(false);
        at
    }

    /// The row at a position.
    #[inline]
    pub fn entry(&self, at: usize) -> Entry<'_> {
        let values = &self.values[at * self.dim..(at + 1) * self.dim];
        Entry { row: self.rows[at], id: self.ids[at], state: self.states[at], values }
    }

    /// The state and values at a position, to be changed.
    #[inline]
    pub fn entry_mut(&mut self, at: usize) -> (&mut f32, &mut [f32]) {
        let values = &mut self.values[at * self.dim..(at + 1) * self.dim];
        (&mut self.states[at], values)
    }

    fn values_mut(&mut self, at: usize) -> &mut [f32] {
        &mut self.values[at * self.dim..(at + 1) * self.dim]
    }

    /// Notes that the row at a position differs from the last commit.
    #[inline]
    pub fn mark_dirty(&mut self, at: usize) {
        if !self.is_dirty[at] {
            self.is_dirty[at] = true;
            self.dirty.push(at as u32);
        }
    }

    /// Positions of the rows that differ from the last commit.
    pub fn dirty(&self) -> &[u32] {
        &self.dirty
    }

    /// Notes that all rows are as committed.
    pub fn mark_clean(&mut self) {
        for at in self.dirty.drain(..) {
            self.is_dirty[at as usize] = false;
        }
    }

    /// Positions in the order of row numbers.
    pub fn sorted(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.rows.len() as u32).collect();
        order.sort_unstable_by_key(|&at| self.rows[at as usize]);
        order
    }
}

/// Ids are mixed once; the default hasher's resistance to chosen keys is not
/// needed for a table that is emptied at each checkpoint.
#[derive(Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = mix(self.0 ^ u64::from(byte));
        }
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = mix(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_replaced_sorted_and_cleaned() {
        let mut overlay = Overlay::new(2);
        let at = overlay.add(7, 70, 0.5, |v| v.fill(1.0));
        overlay.put(Entry { row: 3, id: 30, state: 0.0, values: &[2.0, 3.0] });
        overlay.put(Entry { row: 7, id: 70, state: 1.5, values: &[4.0, 5.0] });
        overlay.mark_dirty(at);
        overlay.mark_dirty(at);
        assert_eq!(overlay.len(), 2);
        assert_eq!(overlay.dirty(), [0]);
        assert_eq!(overlay.sorted(), [1, 0]);
        let entry = overlay.entry(overlay.position(7).unwrap());
        assert_eq!((entry.state, entry.values), (1.5, &[4.0, 5.0][..]));
        assert_eq!(overlay.position(5), None);
        overlay.mark_clean();
        overlay.mark_dirty(1);
        assert_eq!(overlay.dirty(), [1]);
    }
}
