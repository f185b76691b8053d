//! A checkpoint: writes the overlay into the slabs and the index, and syncs them. It
//! may be cut off anywhere and done again: the journal stays in force
//! until its caller, the writer, resets it.

use std::path::Path;

use crate::error::Result;
use crate::header::sync_dir;
use crate::index::IndexWriter;
use crate::slab::{ROWS_PER_SLAB, RowSlab, SlabId, StateSlab, slabs_for};
use crate::view::View;

/// Where a checkpoint goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    pub dir: &'a Path,
    pub dim: usize,
    /// Rows that the slabs hold already; slabs past them are leftovers, made anew.
    pub base_rows: usize,
}

/// Makes slabs and index hold all that `view` shows, which must be committed. The
/// caller holds the writer lock and the exclusive readers lock.
pub(crate) fn write(view: &View, target: Target<'_>) -> Result<()> {
    write_slabs(view, target)?;
    write_index(view, target.dir)?;
    sync_dir(target.dir)
}

fn write_slabs(view: &View, target: Target<'_>) -> Result<()> {
    let Target { dir, dim, base_rows } = target;
    let overlay = &view.overlay;
    let number_of = |at: u32| overlay.entry(at as usize).row as usize / ROWS_PER_SLAB;
    for part in overlay.sorted().chunk_by(|&a, &b| number_of(a) == number_of(b)) {
        let id = SlabId { number: number_of(part[0]), dim };
        let fresh = id.number >= slabs_for(base_rows);
        let mut rows = RowSlab::open_mut(dir, id, fresh)?;
        let mut states = StateSlab::open_mut(dir, id, fresh)?;
        for &at in part {
            let entry = overlay.entry(at as usize);
            let at = entry.row as usize % ROWS_PER_SLAB;
            rows.set(at, entry.id, entry.values);
            states.set(at, entry.state);
        }
        rows.sync()?;
        states.sync()?;
    }
    Ok(())
}

fn write_index(view: &View, dir: &Path) -> Result<()> {
    if view.rows() > view.index_room() {
        return IndexWriter::build(dir, view.rows(), view.ids());
    }
    let mut index = IndexWriter::open(dir)?;
    for (id, row) in view.overlay.new_ids() {
        index.insert(id, row);
    }
    index.finish(dir)
}
