//! The training store: trains rows in the overlay and commits them, gives ids their rows, and takes
//! rows back. It alone opens optimizer state. It does not decide when to commit, nor which ids
//! matter: its caller does.

use std::collections::VecDeque;
use std::path::Path;

use hypercast_core::hash::splitmix64;

use crate::error::Result;
use crate::meta::{Meta, StoreKind};
use crate::sketch::Sketch;
use crate::snapshot;
use crate::writer::StoreWriter;
use crate::{Adagrad, Error, RowFormat, StoreHandle, StoreOptions, StoreReader, Verify};

/// Ids worked on together: their cache misses overlap.
const BLOCK: usize = 64;

/// Removed ids that are remembered, at most.
const MOST_REMOVED: usize = 1 << 20;

/// A store that is open for training. It holds the store's writer lock; dropping
/// it discards what is not committed, as a crash would.
#[derive(Debug)]
pub struct Store {
    writer: StoreWriter,
    clock: u32,
    admit_after: u8,
    /// The newest removals, with the generation of the commit that has or will have them.
    removed: VecDeque<(u64, u64)>,
    /// Removals by later commits are all remembered.
    removed_from: u64,
}

impl Store {
    /// Makes an empty store in `dir`, which is made if need be and must not hold one.
    pub fn create(dir: impl AsRef<Path>, options: &StoreOptions) -> Result<Store> {
        let meta = Meta::new(options, StoreKind::Training, RowFormat::F32)?;
        Ok(Self::of(StoreWriter::create(dir.as_ref(), meta)?))
    }

    /// Opens the store in `dir` for writing, at its last committed generation, and checks all of
    /// it. Fails with [`Error::Locked`] while another writer lives.
    pub fn open(dir: impl AsRef<Path>) -> Result<Store> {
        Self::open_with(dir, Verify::Full)
    }

    /// Like [`Store::open`], checking as much as `verify` says.
    pub fn open_with(dir: impl AsRef<Path>, verify: Verify) -> Result<Store> {
        let dir = dir.as_ref();
        let meta = Meta::read(dir)?;
        if meta.kind == StoreKind::Inference {
            return Err(Error::ReadOnly { path: dir.to_owned() });
        }
        Ok(Self::of(StoreWriter::open(dir, meta, verify)?))
    }

    fn of(writer: StoreWriter) -> Store {
        let removed_from = writer.generation();
        Store { writer, clock: 0, admit_after: 1, removed: VecDeque::new(), removed_from }
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

    /// What the store was made with.
    pub fn options(&self) -> StoreOptions {
        self.writer.meta.options()
    }

    /// The last committed generation; 0 before the first commit.
    pub fn generation(&self) -> u64 {
        self.writer.generation()
    }

    /// All ids, in the order of their rows: that in which they came, but for rows used again.
    pub fn ids(&self) -> impl Iterator<Item = u64> + '_ {
        self.writer.view.ids_and_rows().map(|(id, _)| id)
    }

    /// Looks whether all that was read of the store's files, ids too, was what they hold: none was
    /// cut since it was opened. A commit does so itself; what is to be sent elsewhere is looked at
    /// with this.
    ///
    /// # Errors
    /// [`Error::FileLost`] with the first file that was cut, also if it is whole again.
    pub fn check_files(&self) -> Result<()> {
        self.writer.check_files()
    }

    /// A handle that other threads read committed rows with while this store goes on.
    pub fn handle(&mut self) -> Result<StoreHandle> {
        self.writer.handle()
    }

    /// From now on an id gets a row when it is asked for the `sightings`th time in
    /// [`Store::gather_or_init`]; 1, the default, is at once. Until then its reads give zeros and
    /// its gradients change nothing. Sightings are counted in bounded memory, so an id may be
    /// admitted early; they are part of commits.
    pub fn admit_after(&mut self, sightings: u8) {
        assert!(sightings > 0, "an id is seen at least once");
        self.admit_after = sightings;
        if sightings > 1 {
            self.writer.sketch.get_or_insert_with(Sketch::new);
        }
    }

    /// Sets the time that changed rows are stamped with, in the caller's unit, say training steps;
    /// see [`Store::expire`].
    pub fn set_clock(&mut self, clock: u32) {
        self.clock = clock;
    }

    /// Removes the rows that were not changed at clock `before` or later; gives their number. It
    /// takes effect with the next commit. Their row numbers are given to new ids after the next
    /// checkpoint.
    pub fn expire(&mut self, before: u32) -> usize {
        let view = &self.writer.view;
        let old = |&(_, row): &(u64, u32)| self.writer.state(row).clock < before;
        let rows: Vec<(u64, u32)> = view.ids_and_rows().filter(old).collect();
        for &(id, row) in &rows {
            self.writer.view.remove(row);
            self.note_removed(id);
        }
        rows.len()
    }

    /// Removes the rows of `ids`, where they have one; gives the number. It takes effect as with
    /// [`Store::expire`].
    pub fn remove_rows(&mut self, ids: &[u64]) -> usize {
        let there: Vec<u64> = ids.iter().copied().filter(|&id| self.contains(id)).collect();
        there.iter().for_each(|&id| self.note_removed(id));
        self.writer.remove_rows(ids)
    }

    fn note_removed(&mut self, id: u64) {
        if self.removed.len() == MOST_REMOVED
            && let Some((generation, _)) = self.removed.pop_front()
        {
            self.removed_from = generation;
        }
        self.removed.push_back((self.generation() + 1, id));
    }

    /// The ids whose rows a commit after `generation` has removed, or the next one will; some may
    /// have a new row since. None where that is no longer known: a store remembers its newest
    /// removals (a million) while it is open.
    pub fn removed_since(&self, generation: u64) -> Option<Vec<u64>> {
        let newer = self.removed.iter().filter(|(at, _)| *at > generation);
        (generation >= self.removed_from).then(|| newer.map(|&(_, id)| id).collect())
    }

    /// Whether `id` has a row, be it uncommitted.
    pub fn contains(&self, id: u64) -> bool {
        self.writer.view.find(id).is_some()
    }

    /// The ids whose rows a commit after `generation` has changed or made, in the order of their
    /// rows. What was removed, [`Store::removed_since`] tells.
    pub fn changed_since(&self, generation: u64) -> impl Iterator<Item = u64> + '_ {
        let newer = move |row| u64::from(self.writer.state(row).generation) > generation;
        self.writer.view.ids_and_rows().filter(move |&(_, row)| newer(row)).map(|(id, _)| id)
    }

    /// Copies the rows of `ids` to `out`, `[ids.len(), dim]` row-major; a missing
    /// id gives zeros. Returns the number of missing ids, or [`Error::FileLost`]. Sees uncommitted
    /// updates.
    pub fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        self.writer.view.gather(ids, out)
    }

    /// Like [`Store::gather`], but a missing id gets a row, whose values depend on the store's seed
    /// and the id alone; see also [`Store::admit_after`]. Returns the number of new rows.
    pub fn gather_or_init(&mut self, ids: &[u64], out: &mut [f32]) -> Result<usize> {
        let dim = self.dim();
        assert_eq!(out.len(), ids.len() * dim, "out must be [ids.len(), dim]");
        let before = self.len();
        for block in ids.chunks(BLOCK) {
            self.prefetch(block);
            for &id in block {
                if self.writer.view.find(id).is_none() && self.is_admitted(id) {
                    self.init(id)?;
                }
            }
        }
        self.gather(ids, out)?;
        Ok(self.len() - before)
    }

    /// A step of row-wise Adagrad on the rows of `ids`, with `grads` `[ids.len(), dim]` row-major:
    /// `state += mean(g²)`, then `row -= (learning_rate / (√state + epsilon)) · g`. Ids are meant
    /// to be unique; a repeated one takes a step for each time. A missing id gets a row first, or
    /// is passed over where [`Store::admit_after`] says more than 1. If any gradient is not finite,
    /// no row changes.
    pub fn adagrad(&mut self, ids: &[u64], grads: &[f32], adagrad: &Adagrad) -> Result<()> {
        let dim = self.dim();
        assert_eq!(grads.len(), ids.len() * dim, "grads must be [ids.len(), dim]");
        let means: Vec<f32> = grads.chunks_exact(dim).map(mean_square).collect();
        if let Some(at) = means.iter().position(|mean| !mean.is_finite()) {
            return Err(Error::NotFinite { id: ids[at] });
        }
        let blocks = ids.chunks(BLOCK).zip(means.chunks(BLOCK)).zip(grads.chunks(BLOCK * dim));
        for ((ids, means), grads) in blocks {
            self.prefetch(ids);
            for ((&id, mean), grad) in ids.iter().zip(means).zip(grads.chunks_exact(dim)) {
                let row = match self.writer.view.find(id) {
                    Some(row) => row,
                    None if self.admit_after > 1 => continue,
                    None => self.init(id)?,
                };
                self.step(row, *mean, grad, adagrad);
            }
        }
        Ok(())
    }

    fn step(&mut self, row: u32, mean: f32, grad: &[f32], adagrad: &Adagrad) {
        let at = self.writer.writable(row);
        let (state, values) = self.writer.view.overlay.entry_mut(at);
        state.accumulator += mean;
        state.clock = self.clock;
        let step = adagrad.learning_rate / (state.accumulator.sqrt() + adagrad.epsilon);
        for (value, g) in values.iter_mut().zip(grad) {
            *value -= step * g;
        }
    }

    /// Makes all updates durable and visible to handles, and to readers opened from now on; returns
    /// the new generation, or the old one if nothing has changed. After a failure other than
    /// [`Error::JournalHeld`] the store must be reopened: it opens to the generation before, or to
    /// this one if it was already durable.
    pub fn commit(&mut self) -> Result<u64> {
        self.writer.commit()
    }

    /// Commits, then folds the journal into the slabs, which [`Store::commit`] does by
    /// itself when the journal is long. Returns false, with the journal left as
    /// it is, while a [`StoreReader`] has the store open; handles are no hindrance.
    pub fn checkpoint(&mut self) -> Result<bool> {
        self.writer.checkpoint()
    }

    /// Copies the committed rows, without optimizer state, into a new store in `dir` (which must
    /// not exist or be empty) for serving, with its rows in `format`. It opens with
    /// [`StoreReader::open`] or [`ServingStore::open`](crate::ServingStore::open) only.
    pub fn snapshot_into(&self, dir: impl AsRef<Path>, format: RowFormat) -> Result<()> {
        self.reader()?.snapshot_into(dir, format)
    }

    /// A reader of the rows as they were committed last, however this store goes on. The journal is
    /// read for it, and not folded while it lives; unlike another process's reader it never makes a
    /// commit fail, so it is to be dropped soon.
    pub fn reader(&self) -> Result<StoreReader> {
        self.writer.reader()
    }

    /// Commits, then copies the whole store, optimizer state included, into `dir`, which must not
    /// exist or be empty. The copy is a store of its own, to be opened with [`Store::open`].
    pub fn copy_into(&mut self, dir: impl AsRef<Path>) -> Result<()> {
        // Folding keeps the copy's journal short; where readers prevent it, the journal is copied.
        self.checkpoint()?;
        snapshot::copy(&self.writer.dir, dir.as_ref(), || self.check_files())
    }

    fn prefetch(&self, ids: &[u64]) {
        ids.iter().for_each(|&id| self.writer.view.prefetch(id));
    }

    fn is_admitted(&mut self, id: u64) -> bool {
        match &mut self.writer.sketch {
            Some(sketch) if self.admit_after > 1 => sketch.see(id) >= self.admit_after,
            _ => true,
        }
    }

    fn init(&mut self, id: u64) -> Result<u32> {
        let options = self.options();
        self.writer.append(id, self.clock, |values| init_row(&options, id, values))
    }
}
/// Uniform in `[-init_scale, init_scale)`, from 24 random bits a value.
fn init_row(options: &StoreOptions, id: u64, values: &mut [f32]) {
    const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
    const HALF: f32 = (1 << 23) as f32;
    let mut state = splitmix64(options.seed) ^ splitmix64(id);
    for value in values {
        let uniform = (splitmix64(state) >> 40) as f32 / HALF - 1.0;
        *value = uniform * options.init_scale;
        state = state.wrapping_add(GAMMA);
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
    use crate::writer::JournalLimits;

    const OPTIONS: StoreOptions = StoreOptions { dim: 3, init_scale: 0.5, seed: 7 };
    const STEP: Adagrad = Adagrad { learning_rate: 0.1, epsilon: 1e-8 };

    #[test]
    fn a_long_journal_is_folded_or_refused_while_readers_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
        let empty = store.writer.journal.bytes();
        store.writer.limits = JournalLimits { fold: empty + 70, refuse: empty + 180 };
        let commit = |store: &mut Store| {
            store.adagrad(&[1], &[1.0, 2.0, 3.0], &STEP)?;
            store.commit()
        };
        assert_eq!(commit(&mut store).unwrap(), 1);
        assert_eq!(store.writer.journal.bytes(), empty + 68, "one record of one row");
        let reader = StoreReader::open(dir.path()).unwrap();
        assert_eq!(commit(&mut store).unwrap(), 2);
        assert_eq!(commit(&mut store).unwrap(), 3);
        let error = commit(&mut store).unwrap_err();
        assert!(matches!(error, Error::JournalHeld { bytes, .. } if bytes == empty + 204));
        assert_eq!(reader.generation(), 1);
        drop(reader);
        let mut before = [0.0; 3];
        store.gather(&[1], &mut before).unwrap();
        assert_eq!(store.commit().unwrap(), 4);
        assert_eq!(store.writer.journal.bytes(), empty);
        let mut after = [0.0; 3];
        store.gather(&[1], &mut after).unwrap();
        assert_eq!(before, after);
    }

    #[test]
    fn its_own_reader_keeps_its_rows_and_refuses_no_commit() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::create(dir.path(), &OPTIONS).unwrap();
        let empty = store.writer.journal.bytes();
        let commit = |store: &mut Store| {
            store.adagrad(&[1], &[1.0, 2.0, 3.0], &STEP).unwrap();
            store.commit().unwrap()
        };
        commit(&mut store);
        store.writer.limits = JournalLimits { fold: empty, refuse: empty };
        let (mut then, mut now) = ([0.0; 3], [0.0; 3]);
        store.gather(&[1], &mut then).unwrap();
        let reader = store.reader().unwrap();
        (0..4).for_each(|_| _ = commit(&mut store));
        assert!(store.writer.journal.bytes() > empty, "the reader's rows are not written over");
        reader.gather(&[1], &mut now).unwrap();
        assert_eq!((now, reader.generation()), (then, 1));
        drop(reader);
        commit(&mut store);
        assert_eq!(store.writer.journal.bytes(), empty);
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
