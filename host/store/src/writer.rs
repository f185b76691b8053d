//! A store's one writer, whatever it writes: it holds the lock, commits what its view has changed,
//! folds the journal into the slabs and publishes to the handles of its process. What changes rows
//! is the business of `store` (training) and `serving` (rows from outside).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_core::atomic_dir;
use hypercast_core::dir_lock::DirLock;

use crate::checkpoint;
use crate::error::Result;
use crate::handle::{HandlePublisher, StoreHandle};
use crate::header::sync_dir;
use crate::index;
use crate::journal::{Journal, JournalHead};
use crate::lock::{ReadersLock, writer_lock};
use crate::meta::{Meta, StoreKind};
use crate::overlay::RowState;
use crate::reader::StoreReader;
use crate::sketch::Sketch;
use crate::slab::{ROWS_PER_SLAB, RowShape, RowSlab, SlabId, StateSlab, slabs_for};
use crate::view::View;
use crate::{Error, Verify};

/// How long the journal may become, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct JournalLimits {
    /// A commit that leaves it longer than this folds it into the slabs.
    pub fold: u64,
    /// If other processes' readers kept it from being folded until it is longer than this, it takes
    /// no more.
    pub refuse: u64,
}

impl JournalLimits {
    /// Those of a store whose slabs have so many bytes. Updates go here and there, so a fold writes
    /// far more than the journal holds; it is put off the longer, the larger the store.
    fn of(slab_bytes: u64) -> JournalLimits {
        let fold = (slab_bytes / 4).clamp(128 << 20, 1 << 30);
        JournalLimits { fold, refuse: fold + (1 << 30) }
    }
}

/// An open store, its lock held.
#[derive(Debug)]
pub(crate) struct StoreWriter {
    pub dir: PathBuf,
    pub meta: Meta,
    pub journal: Journal,
    pub view: View,
    /// Empty where the store has no optimizer state.
    states: Vec<StateSlab>,
    pub sketch: Option<Sketch>,
    pub limits: JournalLimits,
    poisoned: bool,
    published: Option<HandlePublisher>,
    /// Shared with the readers that this process has of it.
    own_readers: Arc<()>,
    _lock: DirLock,
}

impl StoreWriter {
    /// Makes an empty store in `dir`, which is made if need be and must not hold one.
    pub fn create(dir: &Path, meta: Meta) -> Result<StoreWriter> {
        atomic_dir::create(dir)?;
        let lock = writer_lock(dir)?;
        if Meta::exists(dir) {
            return Err(Error::AlreadyExists { path: dir.to_owned(), what: "a store" });
        }
        // A creation that was cut off leaves no slab; a slab means that meta.json was lost.
        if dir.join("rows-00000.slab").exists() {
            let what = "parts of a store that has lost its meta.json";
            return Err(Error::AlreadyExists { path: dir.to_owned(), what });
        }
        ReadersLock::create(dir)?;
        Journal::create(dir, meta.dim, JournalHead::folded(0, 0))?;
        index::build(dir, 0, std::iter::empty(), &[], || Ok(()))?;
        sync_dir(dir)?;
        meta.write(dir)?;
        Self::load(dir, meta, lock, Verify::Full)
    }

    /// Takes the lock of the store in `dir`, which has this `meta`, and maps and checks what is
    /// committed.
    pub fn open(dir: &Path, meta: Meta, verify: Verify) -> Result<StoreWriter> {
        let lock = writer_lock(dir)?;
        Self::load(dir, meta, lock, verify)
    }

    fn load(dir: &Path, meta: Meta, lock: DirLock, verify: Verify) -> Result<StoreWriter> {
        let shape = meta.shape();
        let mut journal = Journal::open(dir, meta.dim)?;
        let mut sketch = Sketch::read(dir)?;
        // A journal may hold the counters of a sketch that no checkpoint has written yet.
        let mut fresh = Sketch::new();
        let current = sketch.as_mut().unwrap_or(&mut fresh);
        let view = View::load(dir, &mut journal, shape, verify, Some(current))?;
        if fresh.sightings > 0 {
            sketch = Some(fresh);
        }
        let base_rows = journal.head.base_rows;
        let mut states = Vec::new();
        if meta.kind == StoreKind::Training {
            add_states(&mut states, dir, shape, base_rows)?;
        }
        if verify == Verify::Full && !states.is_empty() {
            for row in (0..base_rows).filter(|&row| view.overlay.position(row as u32).is_none()) {
                states[row / ROWS_PER_SLAB].verify(row % ROWS_PER_SLAB)?;
            }
        }
        Ok(StoreWriter {
            dir: dir.to_owned(),
            meta,
            journal,
            view,
            states,
            sketch,
            limits: JournalLimits::of(slab_bytes(shape, base_rows)),
            poisoned: false,
            published: None,
            own_readers: Arc::default(),
            _lock: lock,
        })
    }

    /// The last committed generation.
    pub fn generation(&self) -> u64 {
        self.journal.head.generation
    }

    /// What training knows of a row.
    pub fn state(&self, row: u32) -> RowState {
        match self.view.overlay.position(row) {
            Some(at) => self.view.overlay.entry(at).state,
            None => slab_state(&self.states, row),
        }
    }

    /// The overlay position of a row to be changed.
    #[inline]
    pub fn writable(&mut self, row: u32) -> usize {
        self.view.writable(row, || slab_state(&self.states, row))
    }

    /// Gives an id that has none a row.
    pub fn append(&mut self, id: u64, clock: u32, fill: impl FnOnce(&mut [f32])) -> Result<u32> {
        const MOST: usize = u32::MAX as usize - 1;
        if self.view.len() >= MOST {
            return Err(Error::Full { path: self.dir.clone(), rows: self.view.len() });
        }
        Ok(self.view.append(id, clock, fill))
    }

    /// Takes their rows from those of `ids` that have one; gives the number.
    pub fn remove_rows(&mut self, ids: &[u64]) -> usize {
        ids.iter().filter_map(|&id| self.view.find(id).map(|row| self.view.remove(row))).count()
    }

    /// A handle for this process's readers.
    pub fn handle(&mut self) -> Result<StoreHandle> {
        self.check_healthy()?;
        if self.published.is_none() {
            // The view may have uncommitted changes; readers begin with what is committed.
            let shape = self.meta.shape();
            let committed = View::load(&self.dir, &mut self.journal, shape, Verify::Journal, None)?;
            let base = self.view.base.clone();
            self.published =
                Some(HandlePublisher::new(&self.dir, base, &committed, self.generation()));
        }
        Ok(self.published.as_ref().expect("just made").handle())
    }

    /// A reader of what is committed; see [`Store::reader`](crate::Store::reader).
    pub fn reader(&self) -> Result<StoreReader> {
        // The writer has verified the store, or was told not to.
        let reader = StoreReader::open_with(&self.dir, Verify::Journal)?;
        Ok(reader.of_writer(self.own_readers.clone()))
    }

    /// Makes all updates durable and visible to readers; see
    /// [`Store::commit`](crate::Store::commit).
    pub fn commit(&mut self) -> Result<u64> {
        self.check_healthy()?;
        self.check_files()?;
        let sketch_is_clean = self.sketch.as_ref().is_none_or(Sketch::is_clean);
        if self.view.overlay.dirty().next().is_none() && sketch_is_clean {
            return Ok(self.generation());
        }
        let bytes = self.journal.bytes();
        // Without readers it goes on, since this commit's fold then empties the journal. Those that
        // this process has end soon.
        let is_own = Arc::strong_count(&self.own_readers) > 1;
        if bytes > self.limits.refuse && !is_own && ReadersLock::try_exclusive(&self.dir)?.is_none()
        {
            return Err(Error::JournalHeld { path: Journal::path(&self.dir), bytes });
        }
        self.poisoned = true;
        let View { overlay, rows, .. } = &self.view;
        let generation = self.journal.commit(overlay, *rows, self.sketch.as_ref())?;
        self.publish(generation);
        self.view.overlay.mark_clean(generation as u32);
        if let Some(sketch) = &mut self.sketch {
            sketch.mark_clean();
        }
        self.poisoned = false;
        if self.journal.bytes() > self.limits.fold {
            self.fold()?;
        }
        Ok(generation)
    }

    /// What was read of a file that was cut may have been zeros, and must not become durable.
    pub fn check_files(&self) -> Result<()> {
        self.view.base.check_always_whole()?;
        self.states.iter().try_for_each(|slab| slab.file.check_always_whole())
    }

    fn publish(&mut self, generation: u64) {
        // Without handles there is nobody to publish for, and a later handle begins with what is
        // committed then.
        if self.published.as_ref().is_some_and(|published| !published.is_read()) {
            self.published = None;
        }
        if let Some(published) = &mut self.published {
            published.commit(&self.view, generation);
        }
    }

    /// Commits, then folds; see [`Store::checkpoint`](crate::Store::checkpoint).
    pub fn checkpoint(&mut self) -> Result<bool> {
        self.commit()?;
        self.fold()
    }

    fn check_healthy(&self) -> Result<()> {
        if self.poisoned {
            return Err(Error::Poisoned { path: self.dir.clone() });
        }
        Ok(())
    }

    /// Copies the overlay, which must be clean, into slabs and index, and empties
    /// the journal. Idempotent: cut off anywhere, the journal still has it all.
    fn fold(&mut self) -> Result<bool> {
        self.check_healthy()?;
        let Some(_exclusive) = ReadersLock::try_exclusive(&self.dir)? else {
            return Ok(false);
        };
        if self.view.overlay.len() == 0 && self.journal.head.is_folded() {
            return Ok(true);
        }
        // This process's readers go on, but none may still be at a row of the slabs that changes
        // now.
        if self.published.as_ref().is_some_and(|published| !published.settle()) {
            return Ok(false);
        }
        self.poisoned = true;
        let shape = self.meta.shape();
        let with_state = self.meta.kind == StoreKind::Training;
        let wants_index = self.view.wants_index();
        checkpoint::write(&self.view, self.sketch.as_ref(), &self.dir, with_state)?;
        self.journal.reset()?;
        self.view.reload(&self.dir, wants_index)?;
        if with_state {
            add_states(&mut self.states, &self.dir, shape, self.view.rows)?;
        }
        self.limits = JournalLimits::of(slab_bytes(shape, self.view.rows));
        if let Some(published) = &mut self.published {
            published.rebase(&self.view);
        }
        self.poisoned = false;
        Ok(true)
    }
}

fn slab_bytes(shape: RowShape, rows: usize) -> u64 {
    slabs_for(rows) as u64 * RowSlab::file_len(SlabId { number: 0, shape })
}

/// What the slabs know of a row.
fn slab_state(states: &[StateSlab], row: u32) -> RowState {
    let slab = states.get(row as usize / ROWS_PER_SLAB);
    slab.map_or_else(RowState::default, |slab| slab.state(row as usize % ROWS_PER_SLAB))
}

/// Maps the slabs that are not mapped yet.
fn add_states(states: &mut Vec<StateSlab>, dir: &Path, shape: RowShape, rows: usize) -> Result<()> {
    for number in states.len()..slabs_for(rows) {
        states.push(StateSlab::open(dir, SlabId { number, shape })?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{RowFormat, StoreOptions};

    #[test]
    fn no_index_is_made_of_a_slab_that_was_cut() {
        let dir = tempfile::tempdir().unwrap();
        let options = StoreOptions { dim: 1, init_scale: 0.0, seed: 0 };
        let meta = Meta::new(&options, StoreKind::Inference, RowFormat::F32).unwrap();
        let mut writer = StoreWriter::create(dir.path(), meta).unwrap();
        let last = ROWS_PER_SLAB as u64 + 10;
        for id in 1..=last {
            writer.append(id, 0, |_| ()).unwrap();
        }
        writer.checkpoint().unwrap();
        // A row of the second slab, so that the first is not written but read.
        assert_eq!(writer.remove_rows(&[last]), 1);
        writer.commit().unwrap();
        let slab = dir.path().join("rows-00000.slab");
        let content = fs::read(&slab).unwrap();
        fs::OpenOptions::new().write(true).open(&slab).unwrap().set_len(0).unwrap();
        let error = writer.fold().unwrap_err();
        assert!(matches!(&error, Error::FileLost { path, .. } if *path == slab), "{error}");
        drop(writer);
        fs::write(&slab, content).unwrap();
        let meta = Meta::read(dir.path()).unwrap();
        let writer = StoreWriter::open(dir.path(), meta, Verify::Full).unwrap();
        assert!((1..last).all(|id| writer.view.find(id).is_some()));
        assert_eq!(writer.view.find(last), None);
    }
}
