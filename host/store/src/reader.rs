//! The reader for other processes, and for snapshots: the rows of one committed generation,
//! read-only. It never opens optimizer state and takes no lock after it is open.

use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::gather;
use crate::journal::Journal;
use crate::lock::ReadersLock;
use crate::meta::Meta;
use crate::view::View;
use crate::{RowFormat, StoreOptions, Verify, snapshot};

/// A store that is open for reading, at the generation that was last committed
/// when it was opened. Shared freely between threads.
#[derive(Debug)]
pub struct StoreReader {
    meta: Meta,
    generation: u64,
    view: View,
    _lock: ReadersLock,
    /// Tells the writer, if it is of this process, that this reader lives. It is dropped after the
    /// lock, so that the writer never sees a lock of nobody's.
    _own: Option<Arc<()>>,
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
        let view = View::load(dir, &mut journal, meta.shape(), verify, None)?;
        let generation = journal.head.generation;
        Ok(StoreReader { meta, generation, view, _lock: lock, _own: None })
    }

    /// A reader that tells the writer of this process, which has given it `own`, that it lives.
    pub(crate) fn of_writer(self, own: Arc<()>) -> StoreReader {
        StoreReader { _own: Some(own), ..self }
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
        self.generation
    }

    /// Whether its rows take more than three quarters of the memory that was available when it was
    /// opened, its control group's limit included, so that reads may come from the disk. `false`
    /// where the system does not say how much memory there is.
    pub fn is_larger_than_memory(&self) -> bool {
        self.view.base.read_ahead.is_some()
    }

    /// All ids, in the order of their rows.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.view.ids_and_rows().map(|(id, _)| id)
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids, or
    /// [`Error::FileLost`](crate::Error::FileLost).
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        self.view.gather(ids, out)
    }

    /// Looks whether every file is whole, also those that nobody reads at the moment. It costs a
    /// system call a file.
    ///
    /// # Errors
    /// [`Error::FileLost`](crate::Error::FileLost) with the first file that was cut.
    pub fn check_files(&self) -> Result<()> {
        gather::check_files(&self.view)
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
