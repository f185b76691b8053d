//! The reader: the rows of one committed generation, read-only. It never opens
//! optimizer state and takes no lock after it is open.

use std::path::Path;

use crate::error::Result;
use crate::journal::Journal;
use crate::lock::ReadersLock;
use crate::meta::Meta;
use crate::view::{Access, View};
use crate::{StoreOptions, snapshot};

/// A store that is open for reading, at the generation that was last committed
/// when it was opened. Shared freely between threads.
#[derive(Debug)]
pub struct StoreReader {
    meta: Meta,
    generation: u64,
    view: View,
    _lock: ReadersLock,
}

impl StoreReader {
    /// Opens the store or snapshot in `dir`; a live writer is no hindrance. Waits
    /// while the writer's checkpoint runs.
    pub fn open(dir: impl AsRef<Path>) -> Result<StoreReader> {
        let dir = dir.as_ref();
        let meta = Meta::read(dir)?;
        let lock = ReadersLock::shared(dir)?;
        let mut journal = Journal::open_for_reading(dir, meta.dim)?;
        let view = View::load(dir, &mut journal, meta.dim, Access::Read)?;
        let generation = journal.head().generation;
        Ok(StoreReader { meta, generation, view, _lock: lock })
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.view.rows()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values a row.
    pub fn dim(&self) -> usize {
        self.meta.dim
    }

    /// What the store was made with.
    pub fn options(&self) -> StoreOptions {
        self.meta.options()
    }

    /// The generation that it sees.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// All ids, in the order in which they came.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.view.ids()
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> usize {
        self.view.gather(ids, out)
    }

    /// See [`Store::snapshot_into`](crate::Store::snapshot_into).
    pub fn snapshot_into(&self, dir: impl AsRef<Path>) -> Result<()> {
        snapshot::write(self, &self.view, dir.as_ref())
    }
}

const _: () = {
    const fn is_shared<T: Send + Sync>() {}
    is_shared::<StoreReader>();
};
