//! The offline check: reads a store from end to end and reports everything that is wrong with it,
//! where an open would stop at the first. It changes nothing and repairs nothing.

use std::path::Path;

use crate::error::{Damage, REBUILD, Result};
use crate::index::Index;
use crate::journal::{Journal, JournalHead};
use crate::lock::ReadersLock;
use crate::meta::{Meta, StoreKind};
use crate::overlay::Overlay;
use crate::sketch::Sketch;
use crate::slab::{ROWS_PER_SLAB, RowSlab, SlabId, StateSlab, slabs_for};
use crate::{Error, RowFormat};

/// What a check has looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreCheck {
    /// The committed generation.
    pub generation: u64,
    /// Row numbers in use, free ones included.
    pub rows: usize,
    /// Of them in the journal.
    pub journal_rows: usize,
    /// Values a row.
    pub dim: usize,
    /// How rows are kept.
    pub format: RowFormat,
    /// Whether it has optimizer state.
    pub trains: bool,
    /// How many things are wrong.
    pub damages: usize,
}

/// Reads all of the store or snapshot in `dir` and tells `report` everything that is wrong. A live
/// writer is no hindrance. Memory grows with the index's row numbers (a bit each) and the journal.
///
/// # Errors
/// A directory without a store, one of another format version, a `meta.json` or a journal's head
/// that says nothing reliable, and what the file system says.
pub fn check(dir: impl AsRef<Path>, report: &mut dyn FnMut(Damage)) -> Result<StoreCheck> {
    let dir = dir.as_ref();
    let meta = Meta::read(dir)?;
    let _lock = ReadersLock::shared(dir)?;
    let mut damages = 0;
    let mut check = Check {
        dir,
        meta: &meta,
        report: &mut |damage| {
            damages += 1;
            report(damage);
        },
    };
    let mut journal = Journal::open_for_reading(dir, meta.dim)?;
    let overlay = check.or_report(journal.replay(None))?;
    let overlay = overlay.unwrap_or_else(|| Overlay::new(meta.dim));
    let head = journal.head;
    let index = check.or_report(Index::open(dir))?;
    if let Some(index) = &index {
        index.damages(check.report);
    }
    check.rows(head, &overlay, index.as_ref())?;
    if meta.kind == StoreKind::Training {
        check.states(head, &overlay)?;
        check.or_report(Sketch::read(dir))?;
    }
    Ok(StoreCheck {
        generation: head.generation,
        rows: head.rows,
        journal_rows: overlay.len(),
        dim: meta.dim,
        format: meta.row_format,
        trains: meta.kind == StoreKind::Training,
        damages,
    })
}

struct Check<'a> {
    dir: &'a Path,
    meta: &'a Meta,
    report: &'a mut dyn FnMut(Damage),
}

impl Check<'_> {
    /// Reports damage; other errors end the check.
    fn or_report<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(Error::Corrupt(damage)) => {
                (self.report)(*damage);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Every row that the journal does not hold, and whether the index leads to it.
    fn rows(&mut self, head: JournalHead, overlay: &Overlay, index: Option<&Index>) -> Result<()> {
        let shape = self.meta.shape();
        for number in 0..slabs_for(head.base_rows) {
            let slab = RowSlab::open(self.dir, SlabId { number, shape });
            let Some(slab) = self.or_report(slab)? else { continue };
            for row in rows_of(number, head.base_rows, overlay) {
                match (slab.is_free(row % ROWS_PER_SLAB), index) {
                    (Err(damage), _) => (self.report)(damage),
                    (Ok(false), Some(index)) => self.row_in_index(&slab, row, index),
                    (Ok(_), _) => {}
                }
            }
        }
        Ok(())
    }

    /// A row with an id must be found by it, unless it came after the index was built.
    fn row_in_index(&mut self, slab: &RowSlab, row: usize, index: &Index) {
        let is_young = row >= index.rows || index.free.binary_search(&(row as u32)).is_ok();
        let id = slab.id(row % ROWS_PER_SLAB);
        if !is_young && index.find(id) != row as u32 {
            let what = "it does not lead from the row's id to the row";
            let damage = Damage::of_file(&self.dir.join("index.table"), what, REBUILD);
            (self.report)(Damage { row: Some(row as u64), id: Some(id), ..damage });
        }
    }

    fn states(&mut self, head: JournalHead, overlay: &Overlay) -> Result<()> {
        let shape = self.meta.shape();
        for number in 0..slabs_for(head.base_rows) {
            let slab = StateSlab::open(self.dir, SlabId { number, shape });
            let Some(slab) = self.or_report(slab)? else { continue };
            for row in rows_of(number, head.base_rows, overlay) {
                slab.verify(row % ROWS_PER_SLAB).unwrap_or_else(&mut *self.report);
            }
        }
        Ok(())
    }
}

/// The rows of a slab that the journal does not hold.
fn rows_of(slab: usize, rows: usize, overlay: &Overlay) -> impl Iterator<Item = usize> + '_ {
    let all = slab * ROWS_PER_SLAB..rows.min((slab + 1) * ROWS_PER_SLAB);
    all.filter(|&row| overlay.position(row as u32).is_none())
}
