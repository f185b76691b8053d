//! The serving store: a snapshot that takes new rows from outside, from a trainer's deltas, while
//! its handles go on reading; or a store that is made of such rows from the start. It has no
//! optimizer state, trains nothing and initialises nothing: a row's values are what was sent.

use std::path::Path;

use crate::error::Result;
use crate::meta::{Meta, StoreKind};
use crate::writer::StoreWriter;
use crate::{Error, RowFormat, StoreHandle, StoreOptions, Verify};

/// A snapshot that is open for rows from outside. Dropping it discards what is not committed.
#[derive(Debug)]
pub struct ServingStore {
    writer: StoreWriter,
}

impl ServingStore {
    /// Makes an empty one in `dir`, which is made if need be and must not hold a store, for rows of
    /// `dim` values.
    pub fn create(dir: impl AsRef<Path>, dim: usize, format: RowFormat) -> Result<ServingStore> {
        // It initialises nothing.
        let options = StoreOptions { dim, init_scale: 0.0, seed: 0 };
        let meta = Meta::new(&options, StoreKind::Inference, format)?;
        Ok(ServingStore { writer: StoreWriter::create(dir.as_ref(), meta)? })
    }

    /// Opens the snapshot in `dir`, at its last committed generation. Fails with [`Error::Locked`]
    /// while another has it open for writing, and with [`Error::NotServing`] for a training store.
    pub fn open(dir: impl AsRef<Path>, verify: Verify) -> Result<ServingStore> {
        let dir = dir.as_ref();
        let meta = Meta::read(dir)?;
        if meta.kind == StoreKind::Training {
            return Err(Error::NotServing { path: dir.to_owned() });
        }
        Ok(ServingStore { writer: StoreWriter::open(dir, meta, verify)? })
    }

    /// Ids that have a row, uncommitted ones included.
    pub fn len(&self) -> usize {
        self.writer.view.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The width of a row, in values.
    pub fn dim(&self) -> usize {
        self.writer.meta.dim
    }

    /// All ids, in the order of their rows.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.writer.view.ids_and_rows().map(|(id, _)| id)
    }

    /// Whether `id` has a row, be it uncommitted.
    pub fn contains(&self, id: u64) -> bool {
        self.writer.view.find(id).is_some()
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids, or [`Error::FileLost`]. Sees uncommitted
    /// rows.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        self.writer.view.gather(ids, out)
    }

    /// How rows are kept.
    pub fn format(&self) -> RowFormat {
        self.writer.meta.row_format
    }

    /// The last committed generation. It begins with that of the training store at the snapshot.
    pub fn generation(&self) -> u64 {
        self.writer.generation()
    }

    /// Looks whether all that was read of the files was what they hold; see
    /// [`Store::check_files`](crate::Store::check_files).
    ///
    /// # Errors
    /// [`Error::FileLost`] with the first file that was cut.
    pub fn check_files(&self) -> Result<()> {
        self.writer.check_files()
    }

    /// A handle that other threads read committed rows with while this store goes on.
    pub fn handle(&mut self) -> Result<StoreHandle> {
        self.writer.handle()
    }

    /// Sets the rows of `ids` to `values`, `[ids.len(), dim]` row-major, in the precision of the
    /// store's format; a missing id gets a row. Handles see it after [`ServingStore::commit`]. If
    /// any value is not finite, no row changes.
    pub fn upsert_rows(&mut self, ids: &[u64], values: &[f32]) -> Result<()> {
        let dim = self.dim();
        assert_eq!(values.len(), ids.len() * dim, "values must be [ids.len(), dim]");
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFiniteValue { id: ids[at / dim] });
        }
        let format = self.format();
        for (&id, values) in ids.iter().zip(values.chunks_exact(dim)) {
            let set = |row: &mut [f32]| {
                row.copy_from_slice(values);
                // As the slabs will have it, so that a checkpoint changes no row.
                format.round(row);
            };
            match self.writer.view.find(id) {
                Some(row) => {
                    let at = self.writer.writable(row);
                    set(self.writer.view.overlay.entry_mut(at).1);
                }
                None => {
                    self.writer.append(id, 0, set)?;
                }
            }
        }
        Ok(())
    }

    /// Removes the rows of `ids`, where they have one; gives the number. Handles see it after
    /// [`ServingStore::commit`].
    pub fn remove_rows(&mut self, ids: &[u64]) -> usize {
        self.writer.remove_rows(ids)
    }

    /// Makes all changes durable and visible; see [`Store::commit`](crate::Store::commit).
    pub fn commit(&mut self) -> Result<u64> {
        self.writer.commit()
    }

    /// Commits, then folds the journal into the slabs; see
    /// [`Store::checkpoint`](crate::Store::checkpoint).
    pub fn checkpoint(&mut self) -> Result<bool> {
        self.writer.checkpoint()
    }
}
