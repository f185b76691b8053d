//! The writer: trains rows in the overlay and commits them. It alone opens
//! optimizer state, and it alone changes a store's files.

use std::fs;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::checkpoint::{self, Target};
use crate::error::{Result, io};
use crate::header::{mix, sync_dir};
use crate::index::IndexWriter;
use crate::journal::{Head, Journal};
use crate::lock::{ReadersLock, WriterLock};
use crate::meta::{Kind, Meta};
use crate::slab::{ROWS_PER_SLAB, SlabId, StateSlab, slabs_for};
use crate::snapshot;
use crate::view::{Access, BLOCK, NONE, View};
use crate::{Adagrad, Error, StoreOptions, StoreReader};

/// How long the journal may become, in bytes.
#[derive(Debug, Clone, Copy)]
struct JournalLimits {
    /// A commit that leaves it longer than this folds it into the slabs.
    fold: u64,
    /// If readers kept it from being folded until it is longer than this, it takes no more.
    refuse: u64,
}

const JOURNAL_LIMITS: JournalLimits = JournalLimits { fold: 128 << 20, refuse: 1 << 30 };

/// A store that is open for training. It holds the store's writer lock; dropping
/// it discards what is not committed, as a crash would.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    meta: Meta,
    journal: Journal,
    view: View,
    states: Vec<StateSlab<Mmap>>,
    limits: JournalLimits,
    poisoned: bool,
    _lock: WriterLock,
}

impl Store {
    /// Makes an empty store in `dir`, which is made if need be and must not hold one.
    pub fn create(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Store> {
        let dir = dir.as_ref();
        let meta = Meta::new(options, Kind::Training)?;
        fs::create_dir_all(dir).map_err(io("create", dir))?;
        let lock = WriterLock::acquire(dir)?;
        if Meta::exists(dir) {
            return Err(Error::AlreadyExists { path: dir.to_owned(), what: "a store" });
        }
        // A creation that was cut off leaves no slab; a slab means that meta.json was lost.
        if dir.join("rows-00000.slab").exists() {
            let what = "parts of a store that has lost its meta.json";
            return Err(Error::AlreadyExists { path: dir.to_owned(), what });
        }
        ReadersLock::create(dir)?;
        Journal::create(dir, options.dim, Head::folded(0, 0))?;
        IndexWriter::build(dir, 0, std::iter::empty())?;
        sync_dir(dir)?;
        meta.write(dir)?;
        Self::load(dir, meta, lock)
    }

    /// Opens the store in `dir` for writing, at its last committed generation. Fails with
    /// [`Error::Locked`] while another writer lives.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        let dir = dir.as_ref();
        let meta = Meta::read(dir)?;
        if meta.kind == Kind::Inference {
            return Err(Error::ReadOnly { path: dir.to_owned() });
        }
        let lock = WriterLock::acquire(dir)?;
        Self::load(dir, meta, lock)
    }

    /// Opens the store in `dir`, which must have been made with the same options, or makes it.
    pub fn open_or_create(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Store> {
        let dir = dir.as_ref();
        if !Meta::exists(dir) {
            return Self::create(dir, options);
        }
        let found = Meta::read(dir)?.options();
        if found != *options {
            return Err(Error::OptionsDiffer {
                path: dir.to_owned(),
                found: format!("{found:?}"),
                wanted: format!("{options:?}"),
            });
        }
        Self::open(dir)
    }

    fn load(dir: &Path, meta: Meta, lock: WriterLock) -> Result<Store> {
        let mut journal = Journal::open(dir, meta.dim)?;
        let view = View::load(dir, &mut journal, meta.dim, Access::Write)?;
        let base_rows = journal.head().base_rows;
        let states = open_states(dir, meta.dim, base_rows)?;
        for row in (0..base_rows).filter(|&row| view.overlay.position(row as u32).is_none()) {
            states[row / ROWS_PER_SLAB].verify(row % ROWS_PER_SLAB)?;
        }
        let dir = dir.to_owned();
        Ok(Store {
            dir,
            meta,
            journal,
            view,
            states,
            limits: JOURNAL_LIMITS,
            poisoned: false,
            _lock: lock,
        })
    }

    /// Rows, uncommitted ones included.
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

    /// The last committed generation; 0 before the first commit.
    pub fn generation(&self) -> u64 {
        self.journal.head().generation
    }

    /// All ids, in the order in which they came.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.view.ids()
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids. Sees uncommitted updates.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> usize {
        self.view.gather(ids, out)
    }

    /// Like [`Store::gather`], but a missing id gets a row, whose values depend on
    /// the store's seed and the id alone. Returns the number of new rows.
    pub fn gather_or_init(&mut self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        let dim = self.meta.dim;
        assert_eq!(out.len(), ids.len() * dim, "out must be [ids.len(), dim]");
        let before = self.len();
        for (ids, out) in ids.chunks(BLOCK).zip(out.chunks_mut(BLOCK * dim)) {
            let rows = self.rows_or_init(ids)?;
            self.view.copy_rows(&rows[..ids.len()], out);
        }
        Ok(self.len() - before)
    }

    /// A step of row-wise Adagrad on the rows of `ids`, with `grads`
    /// `[ids.len(), dim]` row-major: `state += mean(g²)`, then
    /// `row -= (learning_rate / (√state + epsilon)) · g`. Ids are meant to be unique;
    /// a repeated one takes a step for each time. A missing id gets a row first. If any
    /// gradient is not finite, no row changes.
    pub fn adagrad(&mut self, ids: &[u64], grads: &[f32], adagrad: &Adagrad) -> Result<()> {
        let dim = self.meta.dim;
        assert_eq!(grads.len(), ids.len() * dim, "grads must be [ids.len(), dim]");
        let means: Vec<f32> = grads.chunks_exact(dim).map(mean_square).collect();
        if let Some(at) = means.iter().position(|mean| !mean.is_finite()) {
            return Err(Error::NotFinite { id: ids[at] });
        }
        let blocks = ids.chunks(BLOCK).zip(means.chunks(BLOCK)).zip(grads.chunks(BLOCK * dim));
        for ((ids, means), grads) in blocks {
            let rows = self.rows_or_init(ids)?;
            for ((&row, mean), grad) in rows.iter().zip(means).zip(grads.chunks_exact(dim)) {
                let states = &self.states;
                let at = self.view.writable(row, || {
                    states[row as usize / ROWS_PER_SLAB].state(row as usize % ROWS_PER_SLAB)
                });
                let (state, values) = self.view.overlay.entry_mut(at);
                *state += mean;
                let step = adagrad.learning_rate / (state.sqrt() + adagrad.epsilon);
                for (value, g) in values.iter_mut().zip(grad) {
                    *value -= step * g;
                }
            }
        }
        Ok(())
    }

    /// Makes all updates durable and visible to readers opened from now on; returns the new
    /// generation, or the old one if nothing has changed. After a failure other than
    /// [`Error::JournalHeld`] the store must be reopened: it opens to the generation
    /// before, or to this one if it was already durable.
    pub fn commit(&mut self) -> Result<u64> {
        self.check_healthy()?;
        if self.view.overlay.dirty().is_empty() {
            return Ok(self.generation());
        }
        let bytes = self.journal.bytes();
        // Without readers it goes on, since this commit's fold then empties the journal.
        if bytes > self.limits.refuse && ReadersLock::try_exclusive(&self.dir)?.is_none() {
            return Err(Error::JournalHeld { path: Journal::path(&self.dir), bytes });
        }
        self.poisoned = true;
        let generation = self.journal.commit(&self.view.overlay, self.view.rows())?;
        self.view.overlay.mark_clean();
        self.poisoned = false;
        if self.journal.bytes() > self.limits.fold {
            self.fold()?;
        }
        Ok(generation)
    }

    /// Commits, then folds the journal into the slabs, which [`Store::commit`] does by
    /// itself when the journal is long. Returns false, with the journal left as
    /// it is, while readers have the store open.
    pub fn checkpoint(&mut self) -> Result<bool> {
        self.commit()?;
        self.fold()
    }

    /// Copies the committed rows, without optimizer state, into a new store
    /// in `dir` (which must not exist or be empty) for serving. It opens with
    /// [`StoreReader::open`] only.
    pub fn snapshot_into(&self, dir: impl AsRef<Path>) -> Result<()> {
        StoreReader::open(&self.dir)?.snapshot_into(dir)
    }

    /// Commits, then copies the whole store, optimizer state included, into `dir`, which must not
    /// exist or be empty. The copy is a store of its own, to be opened with [`Store::open`].
    pub fn copy_into(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        // Folding keeps the copy's journal short; where readers prevent it, the journal is copied.
        self.checkpoint()?;
        snapshot::copy(&self.dir, dir.as_ref())
    }

    fn check_healthy(&self) -> Result<()> {
        if self.poisoned {
            return Err(Error::Poisoned { path: self.dir.clone() });
        }
        Ok(())
    }

    /// Row numbers of up to `BLOCK` ids.
    fn rows_or_init(&mut self, ids: &[u64]) -> Result<[u32; BLOCK]> {
        let mut rows = [NONE; BLOCK];
        for (row, &id) in rows.iter_mut().zip(ids) {
            *row = match self.view.find(id) {
                Some(row) => row,
                None => self.init(id)?,
            };
        }
        Ok(rows)
    }

    fn init(&mut self, id: u64) -> Result<u32> {
        if self.len() >= (NONE - 1) as usize {
            return Err(Error::Full { path: self.dir.clone(), rows: self.len() });
        }
        let options = self.options();
        Ok(self.view.append(id, |values| init_row(&options, id, values)))
    }

    /// Copies the overlay, which must be clean, into slabs and index, and empties
    /// the journal. Idempotent: cut off anywhere, the journal still has it all.
    fn fold(&mut self) -> Result<bool> {
        self.check_healthy()?;
        let Some(_exclusive) = ReadersLock::try_exclusive(&self.dir)? else {
            return Ok(false);
        };
        if self.view.overlay.len() == 0 {
            return Ok(true);
        }
        self.poisoned = true;
        let base_rows = self.journal.head().base_rows;
        checkpoint::write(&self.view, Target { dir: &self.dir, dim: self.meta.dim, base_rows })?;
        self.journal.reset()?;
        self.view.reload(&self.dir)?;
        self.states = open_states(&self.dir, self.meta.dim, self.view.rows())?;
        self.poisoned = false;
        Ok(true)
    }
}

fn open_states(dir: &Path, dim: usize, rows: usize) -> Result<Vec<StateSlab<Mmap>>> {
    (0..slabs_for(rows)).map(|number| StateSlab::open(dir, SlabId { number, dim })).collect()
}

/// Uniform in `[-init_scale, init_scale)`, from 24 random bits a value.
fn init_row(options: &StoreOptions, id: u64, values: &mut [f32]) {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    const HALF: f32 = (1 << 23) as f32;
    let mut state = mix(options.seed.wrapping_add(GAMMA)) ^ mix(id.wrapping_add(GAMMA));
    for value in values {
        state = state.wrapping_add(GAMMA);
        let uniform = (mix(state) >> 40) as f32 / HALF - 1.0;
        *value = uniform * options.init_scale;
    }
}

/// Eight partial sums, so that it vectorises and is the same on every machine.
fn mean_square(grad: &[f32]) -> f32 {
    let (blocks, rest) = grad.as_chunks::<8>();
    let mut sums = [0.0f32; 8];
    for block in blocks {
        for (sum, g) in sums.iter_mut().zip(block) {
            *sum += g * g;
        }
    }
    let rest: f32 = rest.iter().map(|g| g * g).sum();
    (sums.iter().sum::<f32>() + rest) / grad.len() as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: StoreOptions = StoreOptions { dim: 3, init_scale: 0.5, seed: 7 };
    const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-8 };

    #[test]
    fn a_long_journal_is_folded_or_refused_while_readers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
        let empty = store.journal.bytes();
        store.limits = JournalLimits { fold: empty + 50, refuse: empty + 120 };
        let commit = |store: &mut Store| {
            store.adagrad(&[1], &[1.0, 2.0, 3.0], &STEP)?;
            store.commit()
        };
        assert_eq!(commit(&mut store).unwrap(), 1);
        assert_eq!(store.journal.bytes(), empty + 48, "one record of one row");
        let reader = StoreReader::open(dir.path()).unwrap();
        assert_eq!(commit(&mut store).unwrap(), 2);
        assert_eq!(commit(&mut store).unwrap(), 3);
        let error = commit(&mut store).unwrap_err();
        assert!(matches!(error, Error::JournalHeld { bytes, .. } if bytes == empty + 144));
        assert_eq!(reader.generation(), 1);
        drop(reader);
        let mut before = [0.0; 3];
        store.gather(&[1], &mut before);
        assert_eq!(store.commit().unwrap(), 4);
        assert_eq!(store.journal.bytes(), empty);
        let mut after = [0.0; 3];
        store.gather(&[1], &mut after);
        assert_eq!(before, after);
    }

    #[test]
    fn initial_values_fill_the_range_evenly() {
        let mut values = vec![0.0; 1000];
        let (mut sum, mut square) = (0.0, 0.0);
        for id in 0..100 {
            init_row(&OPTIONS, id, &mut values);
            for &v in &values {
                assert!((-0.5..0.5).contains(&v));
                sum += f64::from(v);
                square += f64::from(v) * f64::from(v);
            }
        }
        assert!((sum / 1e5).abs() < 0.003, "the mean is 0 within 3 sigma: {}", sum / 1e5);
        assert!((square / 1e5 - 1.0 / 12.0).abs() < 0.001, "the variance is 1/12");
    }
}
