//! A checkpoint: writes the overlay into the slabs, the index where there must be another, and the
//! sketch, and syncs them. It may be cut off anywhere and done again: the journal stays in force
//! until its caller, the writer, resets it.

use std::path::Path;

use crate::error::Result;
use crate::header::sync_dir;
use crate::overlay::RowState;
use crate::sketch::Sketch;
use crate::slab::{ROWS_PER_SLAB, SlabId, slabs_for};
use crate::slab_writer::{RowSlabWriter, StateSlabWriter, Writing};
use crate::view::View;

/// Makes slabs and index hold all that `view` shows, which must be committed. The caller holds the
/// writer lock and the exclusive readers lock, and no reader of its own process is at these rows of
/// the slabs. `with_state` says whether the store has optimizer state.
pub(crate) fn write(
    view: &View,
    sketch: Option<&Sketch>,
    dir: &Path,
    with_state: bool,
) -> Result<()> {
    write_slabs(view, dir, with_state)?;
    if view.wants_index() {
        view.build_index(dir)?;
    }
    if let Some(sketch) = sketch {
        sketch.write(dir)?;
    }
    sync_dir(dir)
}

fn write_slabs(view: &View, dir: &Path, with_state: bool) -> Result<()> {
    let View { base, overlay, .. } = view;
    let number_of = |at: u32| overlay.entry(at as usize).row as usize / ROWS_PER_SLAB;
    for part in overlay.sorted().chunk_by(|&a, &b| number_of(a) == number_of(b)) {
        let id = SlabId { number: number_of(part[0]), shape: base.shape };
        // Slabs past those of the last checkpoint are leftovers.
        let fresh = id.number >= slabs_for(base.rows);
        let writing = Writing { fresh, rows: part.len() };
        let mut rows = RowSlabWriter::open(dir, id, writing)?;
        let mut states = match with_state {
            true => Some(StateSlabWriter::open(dir, id, writing)?),
            false => None,
        };
        for &position in part {
            let entry = overlay.entry(position as usize);
            let at = entry.row as usize % ROWS_PER_SLAB;
            let is_removed = overlay.is_removed(position as usize);
            match is_removed {
                true => rows.set_free(at)?,
                false => rows.set(at, entry.id, entry.values)?,
            }
            if let Some(states) = &mut states {
                states.set(at, if is_removed { RowState::default() } else { entry.state })?;
            }
        }
        rows.target.sync()?;
        if let Some(states) = states {
            states.target.sync()?;
        }
    }
    Ok(())
}
