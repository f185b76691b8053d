//! The reader for other processes, and for snapshots: the rows of one committed generation,
//! read-only. It never opens optimizer state and takes no lock after it is open.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::journal::{Journal, Position};
use crate::lock::ReadersLock;
use crate::meta::Meta;
use crate::view::{View, ViewOptions};
use crate::{RowFormat, StoreOptions, Verify, snapshot};

/// A store that is open for reading, at the generation that was last committed
/// when it was opened or refreshed. Shared freely between threads.
#[derive(Debug)]
pub struct StoreReader {
    dir: PathBuf,
    meta: Meta,
    followed: Position,
    base_generation: u64,
    view: View,
    lock: ReadersLock,
}

impl StoreReader {
    /// Opens the store or snapshot in `dir` and checks all of it; a live writer is no hindrance.
    /// Waits while the writer's checkpoint runs.
    pub fn open(dir: impl AsRef<Path>) -> Result<StoreReader> {
        Self::open_with(dir, Verify::Full)
    }

    /// Like [`StoreReader::open`], checking as much as `verify` says.
    pub fn open_with(dir: impl AsRef<Path>, verify: Verify) -> Result<StoreReader> {
        let dir = dir.as_ref();
        let meta = Meta::read(dir)?;
        let lock = ReadersLock::shared(dir)?;
        let mut journal = Journal::open_for_reading(dir, meta.dim)?;
        let load = ViewOptions { shape: meta.shape(), verify, may_rebuild: false };
        let view = View::load(dir, &mut journal, load, None)?;
        let followed = journal.position();
        let base_generation = journal.head().base_generation;
        Ok(StoreReader { dir: dir.to_owned(), meta, followed, base_generation, view, lock })
    }

    /// Moves on to the generation that is committed now; gives it. It reads only what was committed
    /// since, or maps the store again where a checkpoint came between: its lock is free for an
    /// instant in which a writer may run one. After a failure it must be opened again.
    pub fn refresh(&mut self) -> Result<u64> {
        self.lock.pass()?;
        let mut journal = Journal::open_for_reading(&self.dir, self.meta.dim)?;
        let head = journal.head();
        if head.base_generation != self.base_generation {
            let load = ViewOptions {
                shape: self.meta.shape(),
                verify: Verify::Journal,
                may_rebuild: false,
            };
            self.view = View::load(&self.dir, &mut journal, load, None)?;
        } else if head.generation > self.followed.generation {
            journal.replay_after(self.followed, &mut self.view.overlay, &mut None)?;
            self.view.follow(head.rows, &Journal::path(&self.dir))?;
        }
        self.followed = journal.position();
        self.base_generation = head.base_generation;
        Ok(head.generation)
    }

    /// Says that the store is larger than the memory for it, where that could not be found out when
    /// it was opened (the system's free memory and the usual control group are looked at): single
    /// pages are then read from the disk where rows are not in memory, and not their neighbours
    /// too.
    pub fn expect_larger_than_memory(&self) {
        self.view.base.expect_partial();
    }

    /// Ids that have a row.
    pub fn len(&self) -> usize {
        self.view.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The width of a row, in values.
    pub fn dim(&self) -> usize {
        self.meta.dim
    }

    /// How rows are kept. Reads give f32 whatever it is.
    pub fn format(&self) -> RowFormat {
        self.meta.row_format
    }

    /// What the store was made with.
    pub fn options(&self) -> StoreOptions {
        self.meta.options()
    }

    /// The generation that it sees.
    pub fn generation(&self) -> u64 {
        self.followed.generation
    }

    /// All ids, in the order of their rows.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.view.ids_and_rows().map(|(id, _)| id)
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> usize {
        self.view.gather(ids, out)
    }

    /// Writes a snapshot as [`Store::snapshot_into`](crate::Store::snapshot_into) does.
    pub fn snapshot_into(&self, dir: impl AsRef<Path>, format: RowFormat) -> Result<()> {
        snapshot::write(self, &self.view, dir.as_ref(), format)
    }
}

const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<StoreReader>();
};
