//! A checkpoint: writes the overlay into the slabs, the index where there must be another, and the
//! sketch, and syncs them. It may be cut off anywhere and done again: the journal stays in force
//! until its caller, the writer, resets it.

use std::path::Path;

use crate::error::Result;
use crate::header::sync_dir;
use crate::overlay::RowState;
use crate::sketch::Sketch;
use crate::slab::{ROWS_PER_SLAB, RowShape, SlabId, slabs_for};
use crate::slab_writer::{RowSlabWriter, StateSlabWriter, Writing};
use crate::view::View;

/// Where a checkpoint goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CheckpointTarget<'a> {
    pub dir: &'a Path,
    pub shape: RowShape,
    /// Rows that the slabs hold already; slabs past them are leftovers, made anew.
    pub base_rows: usize,
    /// Whether the store has optimizer state.
    pub with_state: bool,
}

/// Makes slabs and index hold all that `view` shows, which must be committed. The caller holds the
/// writer lock and the exclusive readers lock, and no reader of its own process is at these rows of
/// the slabs.
pub(crate) fn write(
    view: &View,
    sketch: Option<&Sketch>,
    target: CheckpointTarget<'_>,
) -> Result<()> {
    write_slabs(view, target)?;
    if view.wants_index() {
        view.build_index(target.dir)?;
    }
    if let Some(sketch) = sketch {
        sketch.write(target.dir)?;
    }
    sync_dir(target.dir)
}

fn write_slabs(view: &View, target: CheckpointTarget<'_>) -> Result<()> {
    let CheckpointTarget { dir, shape, base_rows, with_state } = target;
    let overlay = &view.overlay;
    let number_of = |at: u32| overlay.entry(at as usize).row as usize / ROWS_PER_SLAB;
    for part in overlay.sorted().chunk_by(|&a, &b| number_of(a) == number_of(b)) {
        let id = SlabId { number: number_of(part[0]), shape };
        let fresh = id.number >= slabs_for(base_rows);
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
        rows.sync()?;
        if let Some(states) = states {
            states.sync()?;
        }
    }
    Ok(())
}
