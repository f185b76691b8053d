//! The overlay: rows that differ from the slabs, in memory. A writer's holds what
//! was changed since the last checkpoint, a reader's what the journal held when it was opened.
//! It does not know which of its rows are durable, only which are dirty.

/// What training keeps of a row besides its values.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct RowState {
    /// Row-wise Adagrad's.
    pub accumulator: f32,
    /// The last committed generation that changed the row.
    pub generation: u32,
    /// The store's clock when the row was last changed.
    pub clock: u32,
}

/// One row and its state.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry<'a> {
    pub row: u32,
    pub id: u64,
    pub state: RowState,
    pub values: &'a [f32],
}

#[derive(Debug, Clone, Copy)]
struct OverlayRow {
    row: u32,
    id: u64,
    state: RowState,
    is_dirty: bool,
    is_removed: bool,
}

/// Rows by row number, apart from the slabs.
#[derive(Debug, Default)]
pub(crate) struct Overlay {
    dim: usize,
    /// A bit a row: whether it is here. Small enough for the cache, so rows that are not here cost
    /// no miss.
    bits: Vec<u64>,
    /// By row number: the row's position here, where its bit is set.
    place: Vec<u32>,
    items: Vec<OverlayRow>,
    values: Vec<f32>,
    dirty: Vec<u32>,
    /// How many of its rows are removed.
    pub removed: usize,
}

impl Overlay {
    /// An empty one for rows of `dim` values.
    pub fn new(dim: usize) -> Overlay {
        Overlay { dim, ..Overlay::default() }
    }

    /// How many rows it holds, removed ones included.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Where a row is, if it is here.
    #[inline]
    pub fn position(&self, row: u32) -> Option<usize> {
        let word = self.bits.get(row as usize / 64)?;
        (word >> (row % 64) & 1 == 1).then(|| self.place[row as usize] as usize)
    }

    /// Asks for what `position` reads beyond the bits.
    #[inline]
    pub fn prefetch(&self, row: u32) {
        let word = self.bits.get(row as usize / 64).copied().unwrap_or(0);
        if word >> (row % 64) & 1 == 1 {
            crate::gather::prefetch((&raw const self.place[row as usize]).cast());
        }
    }

    /// Sets a row, adding it if need be; gives its position.
    pub fn put(&mut self, entry: Entry<'_>) -> usize {
        assert_eq!(entry.values.len(), self.dim);
        if let Some(at) = self.position(entry.row) {
            self.removed -= usize::from(self.items[at].is_removed);
            let OverlayRow { is_dirty, .. } = self.items[at];
            let Entry { row, id, state, .. } = entry;
            self.items[at] = OverlayRow { row, id, state, is_dirty, is_removed: false };
            self.values[at * self.dim..(at + 1) * self.dim].copy_from_slice(entry.values);
            return at;
        }
        self.add(entry.row, entry.id, entry.state, |out| out.copy_from_slice(entry.values))
    }

    /// Notes that a row belongs to no id any more; gives its position.
    pub fn remove(&mut self, row: u32, id: u64) -> usize {
        let at = self.position(row);
        let at = at.unwrap_or_else(|| self.add(row, id, RowState::default(), |_| ()));
        self.removed += usize::from(!self.items[at].is_removed);
        self.items[at].is_removed = true;
        at
    }

    /// Adds a row whose values `fill` writes into zeros; gives its position.
    pub fn add(
        &mut self,
        row: u32,
        id: u64,
        state: RowState,
        fill: impl FnOnce(&mut [f32]),
    ) -> usize {
        let start = self.values.len();
        self.values.resize(start + self.dim, 0.0);
        fill(&mut self.values[start..]);
        let at = self.items.len();
        let index = row as usize;
        if self.place.len() <= index {
            self.place.resize(index + 1, 0);
            self.bits.resize(index / 64 + 1, 0);
        }
        self.place[index] = at as u32;
        self.bits[index / 64] |= 1 << (row % 64);
        self.items.push(OverlayRow { row, id, state, is_dirty: false, is_removed: false });
        at
    }

    /// The row at a position.
    #[inline]
    pub fn entry(&self, at: usize) -> Entry<'_> {
        let OverlayRow { row, id, state, .. } = self.items[at];
        Entry { row, id, state, values: self.values(at) }
    }

    /// The values at a position.
    #[inline]
    pub fn values(&self, at: usize) -> &[f32] {
        &self.values[at * self.dim..(at + 1) * self.dim]
    }

    /// Whether the row at a position is removed.
    #[inline]
    pub fn is_removed(&self, at: usize) -> bool {
        self.items[at].is_removed
    }

    /// The state and values at a position, to be changed.
    #[inline]
    pub fn entry_mut(&mut self, at: usize) -> (&mut RowState, &mut [f32]) {
        let values = &mut self.values[at * self.dim..(at + 1) * self.dim];
        (&mut self.items[at].state, values)
    }

    /// Notes that the row at a position differs from the last commit.
    #[inline]
    pub fn mark_dirty(&mut self, at: usize) {
        if !self.items[at].is_dirty {
            self.items[at].is_dirty = true;
            self.dirty.push(at as u32);
        }
    }

    /// Positions of the rows that differ from the last commit.
    pub fn dirty(&self) -> impl Iterator<Item = usize> + '_ {
        self.dirty.iter().map(|&at| at as usize)
    }

    /// Notes that all rows are as committed in `generation`.
    pub fn mark_clean(&mut self, generation: u32) {
        for at in self.dirty.drain(..) {
            let item = &mut self.items[at as usize];
            item.is_dirty = false;
            item.state.generation = generation;
        }
    }

    /// Positions in the order of row numbers.
    pub fn sorted(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.items.len() as u32).collect();
        order.sort_unstable_by_key(|&at| self.items[at as usize].row);
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_replaced_sorted_removed_and_cleaned() {
        let state = |accumulator| RowState { accumulator, generation: 0, clock: 3 };
        let mut overlay = Overlay::new(2);
        let at = overlay.add(7, 70, state(0.5), |v| v.fill(1.0));
        overlay.put(Entry { row: 3, id: 30, state: state(0.0), values: &[2.0, 3.0] });
        overlay.put(Entry { row: 7, id: 70, state: state(1.5), values: &[4.0, 5.0] });
        overlay.mark_dirty(at);
        overlay.mark_dirty(at);
        assert_eq!(overlay.len(), 2);
        assert_eq!(overlay.dirty, [0]);
        assert_eq!(overlay.sorted(), [1, 0]);
        let entry = overlay.entry(overlay.position(7).unwrap());
        assert_eq!((entry.state, entry.values), (state(1.5), &[4.0, 5.0][..]));
        assert_eq!(overlay.position(5), None);
        overlay.mark_clean(9);
        assert_eq!(overlay.entry(at).state.generation, 9);
        overlay.mark_dirty(1);
        assert_eq!(overlay.dirty, [1]);
        overlay.remove(3, 30);
        overlay.remove(3, 30);
        overlay.remove(200, 9);
        assert_eq!((overlay.removed, overlay.len()), (2, 3));
        overlay.put(Entry { row: 3, id: 31, state: state(0.0), values: &[2.0, 3.0] });
        assert_eq!(overlay.removed, 1);
    }
}
