//! What writer and reader share: slabs and index of the last checkpoint, mapped, with
//! an overlay upon them. It reads, and verifies; it writes no file but a lost index.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use hypercast_core::hash::IdHashKey;

use crate::Verify;
use crate::error::{Result, corrupt};
use crate::gather::{self, RowSource, ValueLocation};
use crate::header::sync_dir;
use crate::index::{self, Index, NONE};
use crate::journal::{Journal, JournalHead};
use crate::mapped_file::MappedFile;
use crate::memory::Residency;
use crate::overlay::{Entry, Overlay, RowState};
use crate::read_ahead::ReadAhead;
use crate::sketch::Sketch;
use crate::slab::{ROWS_PER_SLAB, RowShape, RowSlab, SlabId, slabs_for};

/// Row numbers by id.
pub(crate) type RowByIdMap = HashMap<u64, u32, IdHashKey>;

/// What the last checkpoint left, mapped. Clones share the mappings.
#[derive(Debug, Clone)]
pub(crate) struct Base {
    pub shape: RowShape,
    /// Row numbers that the slabs hold.
    pub rows: usize,
    slabs: Vec<Arc<RowSlab>>,
    starts: Vec<ValuesStart>,
    pub index: Arc<Index>,
    /// Where the slabs are larger than memory.
    pub read_ahead: Option<Arc<ReadAhead>>,
}

/// Where a slab's values begin, kept apart from the slab so that it is found without a chase of
/// pointers.
#[derive(Debug, Clone, Copy)]
struct ValuesStart(*const u8);

// SAFETY: it points into a read-only mapping that the same `Base` keeps alive.
unsafe impl Send for ValuesStart {}
// SAFETY: likewise.
unsafe impl Sync for ValuesStart {}

impl Base {
    /// Maps the slabs of `rows` rows, those that `old` has not mapped yet, and the index if it is
    /// another. Where `old` was larger than memory, so is this, and what it found out about its
    /// reads stays: a checkpoint changes little of it.
    pub fn open(dir: &Path, shape: RowShape, rows: usize, old: Option<&Base>) -> Result<Base> {
        let mut slabs = old.map_or(Vec::new(), |old| old.slabs.clone());
        let bytes = slabs_for(rows) as u64 * RowSlab::file_len(SlabId { number: 0, shape });
        let kept = old.and_then(|old| old.read_ahead.clone());
        let residency = if kept.is_some() { Residency::Partial } else { Residency::of(bytes) };
        for number in slabs.len()..slabs_for(rows) {
            let slab = RowSlab::open(dir, SlabId { number, shape })?;
            slab.file.advise(residency);
            slabs.push(Arc::new(slab));
        }
        let starts = slabs.iter().map(|slab| ValuesStart(slab.start())).collect();
        let index = Arc::new(Index::open(dir)?);
        let read_ahead = kept.or_else(|| (residency == Residency::Partial).then(Arc::default));
        Ok(Base { shape, rows, slabs, starts, index, read_ahead })
    }

    /// Fails if a file is lost, and names it.
    pub fn check_files(&self) -> Result<()> {
        self.files().try_for_each(MappedFile::check)
    }

    /// Fails if a file was ever lost since it was mapped, or is shorter now: what was read may have
    /// been zeros. Whoever makes something lasting of what is mapped asks after the last read.
    pub fn check_always_whole(&self) -> Result<()> {
        self.look_at_lengths();
        self.files().try_for_each(MappedFile::check_always_whole)
    }

    /// Finds files that were cut and that nobody has read since.
    pub fn look_at_lengths(&self) {
        self.files().for_each(MappedFile::look_at_length);
    }

    /// Maps lost files again that are whole. `counts` says of a row number whether the slabs' row
    /// is read; what the journal holds may be half written in its slab.
    pub fn restore(&self, counts: &dyn Fn(u32) -> bool) -> Result<()> {
        self.index.file.restore(|| self.index.verify())?;
        self.slabs.iter().try_for_each(|slab| slab.file.restore(|| slab.verify(self.rows, counts)))
    }

    fn files(&self) -> impl Iterator<Item = &MappedFile> {
        std::iter::once(&self.index.file).chain(self.slabs.iter().map(|slab| &slab.file))
    }

    /// A slab and a row's place in it.
    fn at(&self, row: u32) -> (&RowSlab, usize) {
        (&self.slabs[row as usize / ROWS_PER_SLAB], row as usize % ROWS_PER_SLAB)
    }

    /// Where a row's values lie in the slabs.
    #[inline(always)]
    pub fn place(&self, row: u32) -> ValueLocation {
        let row = row as usize;
        if row >= self.rows {
            return ValueLocation::Missing;
        }
        let ValuesStart(start) = self.starts[row / ROWS_PER_SLAB];
        ValueLocation::Slab(start.wrapping_add(row % ROWS_PER_SLAB * self.shape.stride()))
    }
}

/// The rows of a store as its writer sees them.
#[derive(Debug)]
pub(crate) struct View {
    /// Row numbers in use, free ones included.
    pub rows: usize,
    pub base: Base,
    pub overlay: Overlay,
    /// Ids that the index does not have.
    young: RowByIdMap,
    /// Rows of the slabs that belong to no id, for new ids to take. A row that was removed since
    /// the last checkpoint is not here: readers may still come by its number.
    free: BTreeSet<u32>,
}

impl View {
    /// Maps, and checks as far as asked, all that the journal's head says is committed. A writer's
    /// `sketch` is brought up to date, and a lost index rebuilt.
    pub fn load(
        dir: &Path,
        journal: &mut Journal,
        shape: RowShape,
        verify: Verify,
        sketch: Option<&mut Sketch>,
    ) -> Result<View> {
        let JournalHead { rows, base_rows, .. } = journal.head;
        let may_rebuild = sketch.is_some();
        let overlay = journal.replay(sketch)?;
        if may_rebuild && !Index::exists(dir) {
            rebuild_index(dir, shape, base_rows, &overlay)?;
        }
        let base = Base::open(dir, shape, base_rows, None)?;
        let mut view =
            View { rows, base, overlay, young: RowByIdMap::default(), free: BTreeSet::new() };
        if verify == Verify::Full {
            view.base.index.verify()?;
            // A row in the journal may be half written in its slab by a checkpoint that did not
            // end.
            for row in (0..base_rows as u32).filter(|&row| view.overlay.position(row).is_none()) {
                let (slab, at) = view.base.at(row);
                slab.is_free(at)?;
            }
        }
        view.find_young_ids()?;
        view.check_ids(&Journal::path(dir))?;
        // The ids that were found stay; a file that is made good later would not bring them back.
        view.base.check_always_whole()?;
        Ok(view)
    }

    /// Ids that came after the index was built: those of the slabs' later rows, of rows that were
    /// free then, and of the journal.
    fn find_young_ids(&mut self) -> Result<()> {
        let index = Arc::clone(&self.base.index);
        let later = index.rows.min(self.base.rows) as u32..self.base.rows as u32;
        let taken = index.free.iter().copied().filter(|&row| (row as usize) < self.base.rows);
        for row in taken.filter(|&row| self.overlay.position(row).is_none()) {
            let (slab, at) = self.base.at(row);
            if slab.is_free(at)? {
                self.free.insert(row);
            } else {
                self.young.insert(slab.id(at), row);
            }
        }
        // A removal makes a new index, so none of these is free.
        for row in later.filter(|&row| self.overlay.position(row).is_none()) {
            let (slab, at) = self.base.at(row);
            self.young.insert(slab.id(at), row);
        }
        for at in (0..self.overlay.len()).filter(|&at| !self.overlay.is_removed(at)) {
            let Entry { id, row, .. } = self.overlay.entry(at);
            if index.find(id) != row {
                self.young.insert(id, row);
            }
        }
        Ok(())
    }

    /// Maps what a checkpoint has just written.
    pub fn reload(&mut self, dir: &Path, rebuilt_index: bool) -> Result<()> {
        self.base = Base::open(dir, self.base.shape, self.rows, Some(&self.base))?;
        self.free.extend(removed_rows(&self.overlay));
        self.overlay = Overlay::new(self.base.shape.dim);
        if rebuilt_index {
            self.young = RowByIdMap::default();
        }
        Ok(())
    }

    /// The ids of all rows.
    pub fn len(&self) -> usize {
        self.rows - self.free.len() - self.overlay.removed
    }

    /// Whether a checkpoint should make a new index: rows were removed, or the young ids, which
    /// take longer to find, have become many.
    pub fn wants_index(&self) -> bool {
        const FEW: usize = 1 << 14;
        self.overlay.removed > 0 || self.young.len() > FEW.max(self.base.index.ids / 16)
    }

    /// Builds the index of all that the view shows.
    pub fn build_index(&self, dir: &Path) -> Result<()> {
        let free = self.free.iter().copied().chain(removed_rows(&self.overlay));
        let free = Vec::from_iter(free.collect::<BTreeSet<u32>>());
        index::build(dir, self.rows, self.ids_and_rows(), &free, || self.base.check_always_whole())
    }

    /// The row number of `id`. An index that was not verified may lead to a row that there is not:
    /// a miss, as for readers.
    #[inline]
    pub fn find(&self, id: u64) -> Option<u32> {
        let row = self.base.index.find(id);
        if row != NONE && (row as usize) < self.rows && !self.is_gone(row) {
            return Some(row);
        }
        self.young.get(&id).copied()
    }

    /// Asks for where `find` will look for an id.
    pub fn prefetch(&self, id: u64) {
        let table = self.base.index.table();
        gather::prefetch((&raw const table[index::home(id, table.len())]).cast());
    }

    fn is_gone(&self, row: u32) -> bool {
        self.overlay.removed > 0
            && self.overlay.position(row).is_some_and(|at| self.overlay.is_removed(at))
    }

    /// The id of a row that has one.
    fn id(&self, row: u32) -> u64 {
        match self.overlay.position(row) {
            Some(at) => self.overlay.entry(at).id,
            None => {
                let (slab, at) = self.base.at(row);
                slab.id(at)
            }
        }
    }

    /// All ids with their rows, in the order of the rows.
    pub fn ids_and_rows(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        (0..self.rows as u32)
            .filter(|&row| !self.is_gone(row) && !(self.free.contains(&row)))
            .map(|row| (self.id(row), row))
    }

    /// Copies the rows of `ids` to `out`, zeros for missing ones; gives the misses.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        gather::gather(self, ids, out)
    }

    /// Copies a row by number, for a copy that gets a checksum of its own: what does not have the
    /// row's must not get one.
    pub fn copy_row(&self, row: u32, out: &mut [f32]) -> Result<()> {
        match self.overlay.position(row) {
            Some(at) => out.copy_from_slice(self.overlay.values(at)),
            None => {
                let (slab, at) = self.base.at(row);
                if let Err(damage) = slab.is_free(at) {
                    self.base.check_always_whole()?;
                    return Err(damage.into());
                }
                slab.read(at, out);
            }
        }
        Ok(())
    }

    /// Gives an id a row, a free one or else a new one; gives its number.
    pub fn append(&mut self, id: u64, clock: u32, fill: impl FnOnce(&mut [f32])) -> u32 {
        let row = self.free.pop_first().unwrap_or(self.rows as u32);
        self.rows = self.rows.max(row as usize + 1);
        let state = RowState { clock, ..RowState::default() };
        let at = self.overlay.add(row, id, state, fill);
        self.young.insert(id, row);
        self.overlay.mark_dirty(at);
        row
    }

    /// The overlay position of a row to be changed; `state` reads its
    /// state where the row is not in the overlay yet.
    #[inline]
    pub fn writable(&mut self, row: u32, state: impl FnOnce() -> RowState) -> usize {
        let at = match self.overlay.position(row) {
            Some(at) => at,
            None => {
                let (slab, at) = self.base.at(row);
                self.overlay.add(row, slab.id(at), state(), |out| slab.read(at, out))
            }
        };
        self.overlay.mark_dirty(at);
        at
    }

    /// Takes an id's row from it.
    pub fn remove(&mut self, row: u32) {
        let id = self.id(row);
        let at = self.overlay.remove(row, id);
        self.overlay.mark_dirty(at);
        if self.young.get(&id) == Some(&row) {
            self.young.remove(&id);
        }
    }

    /// Ids that the index does not have, with their rows.
    pub fn young(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.young.iter().map(|(&id, &row)| (id, row))
    }

    /// The journal's ids must be found under the same row numbers.
    fn check_ids(&self, journal: &Path) -> Result<()> {
        for at in (0..self.overlay.len()).filter(|&at| !self.overlay.is_removed(at)) {
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

// Slabs and overlay do not change while the view is borrowed: a checkpoint needs its writer's view
// mutably. SAFETY: so what `place` points at stays, and `Base::place` and the overlay keep within
// their rows.
unsafe impl RowSource for View {
    #[inline]
    fn base(&self) -> &Base {
        &self.base
    }

    fn prefetch_young(&self, _id: u64) {
        // A map does not tell where it will look.
    }

    #[inline]
    fn find_young(&self, id: u64) -> u32 {
        self.young.get(&id).copied().unwrap_or(NONE)
    }

    #[inline]
    fn prefetch_place(&self, row: u32) {
        self.overlay.prefetch(row);
    }

    #[inline(always)]
    fn place(&self, row: u32) -> ValueLocation {
        match self.overlay.position(row) {
            None => self.base.place(row),
            Some(at) if self.overlay.is_removed(at) => ValueLocation::Missing,
            Some(at) => ValueLocation::Above(self.overlay.values(at).as_ptr()),
        }
    }
}

fn removed_rows(overlay: &Overlay) -> impl Iterator<Item = u32> + '_ {
    (0..overlay.len()).filter(|&at| overlay.is_removed(at)).map(|at| overlay.entry(at).row)
}

fn rebuild_index(dir: &Path, shape: RowShape, rows: usize, overlay: &Overlay) -> Result<()> {
    let mut ids = Vec::with_capacity(rows);
    let mut free = Vec::new();
    for number in 0..slabs_for(rows) {
        let slab = RowSlab::open(dir, SlabId { number, shape })?;
        for row in number * ROWS_PER_SLAB..rows.min((number + 1) * ROWS_PER_SLAB) {
            // What the journal holds is found there, and its slab may be half written.
            let is_above = overlay.position(row as u32).is_some();
            if is_above || slab.is_free(row % ROWS_PER_SLAB)? {
                free.push(row as u32);
            } else {
                ids.push((slab.id(row % ROWS_PER_SLAB), row as u32));
            }
        }
        slab.file.look_at_length();
        slab.file.check_always_whole()?;
    }
    index::build(dir, rows, ids.into_iter(), &free, || Ok(()))?;
    sync_dir(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Store, StoreOptions};

    #[test]
    fn a_store_that_is_larger_than_memory_gives_the_same_rows() {
        let (dir, dim) = (tempfile::tempdir().unwrap(), 4);
        let options = StoreOptions { dim, init_scale: 0.1, seed: 3 };
        let mut store = Store::create(dir.path(), &options).unwrap();
        let mut add = |ids: std::ops::Range<u64>, checkpoint: bool| {
            let ids: Vec<u64> = ids.collect();
            store.gather_or_init(&ids, &mut vec![0.0; ids.len() * dim]).unwrap();
            store.commit().unwrap();
            assert!(!checkpoint || store.checkpoint().unwrap());
        };
        // In the index, in the slabs but not in the index, and in the journal alone.
        add(0..20_000, true);
        add(20_000..20_200, true);
        add(20_200..20_300, false);
        let shape = RowShape { dim, format: crate::RowFormat::F32 };
        let mut journal = Journal::open_for_reading(dir.path(), dim).unwrap();
        let mut view = View::load(dir.path(), &mut journal, shape, Verify::Journal, None).unwrap();
        assert_eq!((view.base.index.ids, view.base.rows, view.rows), (20_000, 20_200, 20_300));
        let ids: Vec<u64> = (0..6000).map(|at| at * 4999 % 21_000).collect();
        let gather = |view: &View| {
            let mut rows = vec![f32::NAN; ids.len() * dim];
            (view.gather(&ids, &mut rows).unwrap(), rows)
        };
        let whole = gather(&view);
        assert_eq!(whole.0, ids.iter().filter(|&&id| id >= 20_300).count());
        view.base.read_ahead = Some(Arc::default());
        Arc::get_mut(&mut view.base.index).unwrap().residency = Residency::Partial;
        assert!(gather(&view) == whole);
        let next = Base::open(dir.path(), shape, 20_200, Some(&view.base)).unwrap();
        let [old, next] = [&view.base, &next].map(|base| base.read_ahead.as_ref().unwrap());
        assert!(Arc::ptr_eq(old, next), "a checkpoint does not begin anew");
    }
}
