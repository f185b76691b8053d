//! What writer and reader share: slabs and index of the last checkpoint, mapped, with
//! an overlay upon them. It reads, and verifies; it writes no file but a lost index.

use std::path::Path;

use memmap2::Mmap;

use crate::error::{Result, corrupt};
use crate::header::sync_dir;
use crate::index::{Extent, Index, IndexWriter};
use crate::journal::{Head, Journal};
use crate::overlay::{Entry, Overlay};
use crate::slab::{ROWS_PER_SLAB, RowSlab, SlabId, slabs_for};

/// Ids looked up together: their cache misses overlap, and the row numbers
/// between lookup and copy stay in registers and the first cache.
pub(crate) const BLOCK: usize = 64;
/// No row.
pub(crate) const NONE: u32 = u32::MAX;

/// A store's rows.
#[derive(Debug)]
pub(crate) struct View {
    dim: usize,
    rows: usize,
    slabs: Vec<RowSlab<Mmap>>,
    index: Index,
    pub overlay: Overlay,
}

/// Whether a lost index may be rebuilt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

impl View {
    /// Maps and checks all that the journal's head says is committed.
    pub fn load(dir: &Path, journal: &mut Journal, dim: usize, access: Access) -> Result<View> {
        let Head { rows, base_rows, .. } = journal.head();
        let overlay = journal.replay()?;
        let slabs = open_slabs(dir, dim, base_rows)?;
        // A row in the journal may be half written in its slab by a checkpoint that did not end.
        for row in (0..base_rows).filter(|&row| overlay.position(row as u32).is_none()) {
            slabs[row / ROWS_PER_SLAB].verify(row % ROWS_PER_SLAB)?;
        }
        if access == Access::Write && !Index::exists(dir) {
            rebuild_index(dir, &slabs, base_rows)?;
        }
        let index = Index::open(dir)?;
        index.verify(Extent { base_rows, rows })?;
        let view = View { dim, rows, slabs, index, overlay };
        view.check_ids(&Journal::path(dir))?;
        Ok(view)
    }

    /// Maps what a checkpoint has just written.
    pub fn reload(&mut self, dir: &Path) -> Result<()> {
        self.slabs = open_slabs(dir, self.dim, self.rows)?;
        self.index = Index::open(dir)?;
        self.overlay = Overlay::new(self.dim);
        Ok(())
    }

    /// Rows, uncommitted ones included.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// How many rows the index has room for.
    pub fn index_room(&self) -> usize {
        self.index.room()
    }

    /// The row number of `id`.
    #[inline]
    pub fn find(&self, id: u64) -> Option<u32> {
        self.index.find(id).or_else(|| self.overlay.find(id))
    }

    /// The id of a row.
    pub fn id(&self, row: u32) -> u64 {
        match self.overlay.position(row) {
            Some(at) => self.overlay.entry(at).id,
            None => self.slab(row).id(row as usize % ROWS_PER_SLAB),
        }
    }

    /// All ids, in the order of their rows.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.rows as u32).map(|row| self.id(row))
    }

    /// Copies the rows of `ids` to `out`, zeros for missing ones; gives the misses.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> usize {
        assert_eq!(out.len(), ids.len() * self.dim, "out must be [ids.len(), dim]");
        let mut misses = 0;
        for (ids, out) in ids.chunks(BLOCK).zip(out.chunks_mut(BLOCK * self.dim)) {
            let mut rows = [NONE; BLOCK];
            for (row, &id) in rows.iter_mut().zip(ids) {
                *row = self.find(id).unwrap_or(NONE);
                misses += usize::from(*row == NONE);
            }
            self.copy_rows(&rows[..ids.len()], out);
        }
        misses
    }

    /// Copies rows by number, zeros for `NONE`.
    pub fn copy_rows(&self, rows: &[u32], out: &mut [f32]) {
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(self.dim)) {
            match self.overlay.position(row) {
                Some(at) => out.copy_from_slice(self.overlay.entry(at).values),
                None if row == NONE => out.fill(0.0),
                None => self.copy_base(row, out),
            }
        }
    }

    /// Appends a row; gives its number.
    pub fn append(&mut self, id: u64, fill: impl FnOnce(&mut [f32])) -> u32 {
        let row = self.rows as u32;
        let at = self.overlay.add(row, id, 0.0, fill);
        self.overlay.insert_id(id, row);
        self.overlay.mark_dirty(at);
        self.rows += 1;
        row
    }

    /// The overlay position of a row to be changed; `state` reads its
    /// accumulator where the row is not in the overlay yet.
    #[inline]
    pub fn writable(&mut self, row: u32, state: impl FnOnce() -> f32) -> usize {
        let at = match self.overlay.position(row) {
            Some(at) => at,
            None => self.lift(row, state()),
        };
        self.overlay.mark_dirty(at);
        at
    }

    fn lift(&mut self, row: u32, state: f32) -> usize {
        let slab = &self.slabs[row as usize / ROWS_PER_SLAB];
        let at = row as usize % ROWS_PER_SLAB;
        self.overlay.add(row, slab.id(at), state, |out| copy_values(slab.values(at), out))
    }

    #[inline]
    fn copy_base(&self, row: u32, out: &mut [f32]) {
        copy_values(self.slab(row).values(row as usize % ROWS_PER_SLAB), out);
    }

    fn slab(&self, row: u32) -> &RowSlab<Mmap> {
        &self.slabs[row as usize / ROWS_PER_SLAB]
    }

    /// The journal's ids must be in the index, or be new, under the same row numbers.
    fn check_ids(&self, journal: &Path) -> Result<()> {
        for at in 0..self.overlay.len() {
            let Entry { row, id, .. } = self.overlay.entry(at);
            let found = self.find(id);
            if found != Some(row) {
                let what = format!("id {id} is row {row} there and {found:?} in the index");
                return Err(corrupt(journal, what));
            }
        }
        Ok(())
    }
}

#[inline]
fn copy_values(bytes: &[[u8; 4]], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes) {
        *out = f32::from_le_bytes(*bytes);
    }
}

fn open_slabs(dir: &Path, dim: usize, rows: usize) -> Result<Vec<RowSlab<Mmap>>> {
    (0..slabs_for(rows)).map(|number| RowSlab::open(dir, SlabId { number, dim })).collect()
}

fn rebuild_index(dir: &Path, slabs: &[RowSlab<Mmap>], rows: usize) -> Result<()> {
    let ids = (0..rows).map(|row| slabs[row / ROWS_PER_SLAB].id(row % ROWS_PER_SLAB));
    IndexWriter::build(dir, rows, ids)?;
    sync_dir(dir)
}
