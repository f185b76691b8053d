//! Replaces the weights of a model while it serves.
//!
//! An inference pass takes a [`Generation`] when it begins and uses it to its end, so it sees
//! either all old or all new weights and never waits. New rows start in an overlay over the store,
//! in the generation that brings them. When no pass of an earlier generation is left, they are
//! committed to the store, and a generation without the overlay replaces the one with it. Cached
//! histories belong to the generation whose weights encoded them (see `cache_warmup`).

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use hypercast_core::atomic_dir;
use hypercast_store::{RowFormat, ServingStore, StoreHandle, StoreReader, Verify};

use crate::{
    Error, Result,
    checkpoint::{FmManifest, TensorMap, assign_weights},
    growth::{SpecGrowth, growth_of},
    history::HistoryCache,
    model::FmModel,
    serving::{ServingBackend, ServingModel},
    update::{WeightTensor, WeightUpdate, refused},
};

/// Everything that the result of an inference pass depends on besides its examples.
pub(crate) struct Generation<B: ServingBackend> {
    pub(crate) manifest: Arc<FmManifest>,
    pub(crate) model: Arc<ServingModel<B>>,
    pub(crate) cache: Arc<HistoryCache<B>>,
    pub(crate) rows: SparseRows,
}

/// The sparse rows of a generation.
#[derive(Debug)]
pub(crate) enum SparseRows {
    /// The rows of a checkpoint, without updates.
    Fixed(Box<StoreReader>),
    /// The rows of a store that takes updates.
    Updatable {
        store: StoreHandle,
        /// Rows that are not committed to `store` yet.
        overlay: Option<Arc<RowOverlay>>,
    },
}

impl SparseRows {
    /// Writes the rows of `ids` to `out`, zeros for ids without a row.
    pub(crate) fn gather(&self, ids: &[u64], out: &mut [f32]) -> Result<()> {
        match self {
            SparseRows::Fixed(store) => {
                store.gather(ids, out)?;
            }
            SparseRows::Updatable { store, overlay } => {
                store.gather(ids, out)?;
                if let Some(overlay) = overlay {
                    overlay.apply(ids, out);
                }
            }
        }
        Ok(())
    }

    /// Fails if a file of the store was cut, and names it.
    pub(crate) fn check_files(&self) -> Result<()> {
        Ok(match self {
            SparseRows::Fixed(store) => store.check_files(),
            SparseRows::Updatable { store, .. } => store.check_files(),
        }?)
    }
}

/// The rows of an update that are not in the store yet.
#[derive(Debug)]
pub(crate) struct RowOverlay {
    dim: usize,
    /// By id: where its row begins in `rows`, or `None` if the row was removed.
    offsets: HashMap<u64, Option<usize>>,
    rows: Vec<f32>,
}

impl RowOverlay {
    /// The update's rows, rounded as a store of this format will round them.
    fn new(update: &WeightUpdate, removed: &[u64], format: RowFormat) -> RowOverlay {
        let dim = update.manifest.config.embedding_dim;
        let mut rows = update.rows.clone();
        rows.chunks_exact_mut(dim).for_each(|row| format.round(row));
        let present = update.row_ids.iter().enumerate().map(|(at, &id)| (id, Some(at * dim)));
        let offsets = present.chain(removed.iter().map(|&id| (id, None))).collect();
        RowOverlay { dim, offsets, rows }
    }

    /// Overwrites the rows in `out` of those `ids` that the update changed.
    fn apply(&self, ids: &[u64], out: &mut [f32]) {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(self.dim)) {
            match self.offsets.get(id) {
                Some(Some(at)) => out.copy_from_slice(&self.rows[*at..at + self.dim]),
                Some(None) => out.fill(0.0),
                None => {}
            }
        }
    }
}

/// The state that updates change. Updates run one at a time.
pub(crate) struct LiveUpdater<B: ServingBackend> {
    store: ServingStore,
    handle: StoreHandle,
    /// The dense weights in service, by name.
    dense: TensorMap,
    /// Replaced generations that passes may still use.
    retired: Vec<Arc<Generation<B>>>,
    /// How data has grown since updates that may still come.
    growths: Arc<[SpecGrowth]>,
}

/// A checked update, ready to be put in service.
pub(crate) struct PreparedUpdate<B: ServingBackend> {
    pub(crate) generation: Arc<Generation<B>>,
    dense: TensorMap,
}

impl<B: ServingBackend> LiveUpdater<B> {
    /// Copies the store of the checkpoint in `dir` to `work`, replacing its content. `model` has
    /// the checkpoint's weights.
    pub(crate) fn open(
        dir: &Path,
        work: &Path,
        model: &FmModel<B>,
        growths: Arc<[SpecGrowth]>,
    ) -> Result<Self> {
        atomic_dir::remove(work)?;
        let from = StoreReader::open(dir.join("store"))?;
        from.snapshot_into(work, from.format())?;
        let mut store = ServingStore::open(work, Verify::Journal)?;
        let handle = store.handle()?;
        let tensors = WeightTensor::of(model).into_iter();
        let dense = tensors.map(|WeightTensor { name, shape, values }| (name, (shape, values)));
        Ok(Self { store, handle, dense: dense.collect(), retired: Vec::new(), growths })
    }

    pub(crate) fn committed_rows(&self) -> SparseRows {
        SparseRows::Updatable { store: self.handle.clone(), overlay: None }
    }

    /// Checks an update and builds its generation, without putting it in service.
    pub(crate) fn prepare(
        &self,
        mut update: WeightUpdate,
        current: &Generation<B>,
        history_cache_bytes: usize,
    ) -> Result<PreparedUpdate<B>> {
        if let Some(growth) = growth_of(&self.growths, &update.manifest.spec) {
            update.check()?;
            growth.update(&mut update, &self.dense)?;
        }
        check_compatible(&update.manifest, &current.manifest)?;
        update.check()?;
        if update.complete {
            update.check_complete(&self.dense)?;
        }
        let mut dense = self.dense.clone();
        update.write_into(&mut dense)?;
        let model: FmModel<B> =
            assign_weights(current.model.model.clone(), dense.clone()).map_err(Error::Update)?;
        let mut removed = update.removed_row_ids.clone();
        if update.complete {
            let sent: std::collections::HashSet<u64> = update.row_ids.iter().copied().collect();
            removed.extend(self.store.ids().filter(|id| !sent.contains(id)));
        }
        let overlay = Arc::new(RowOverlay::new(&update, &removed, self.store.format()));
        let generation = Generation {
            manifest: Arc::new(update.manifest),
            model: Arc::new(ServingModel::new(model, current.model.shared.clone())),
            cache: Arc::new(HistoryCache::new(history_cache_bytes)),
            rows: SparseRows::Updatable { store: self.handle.clone(), overlay: Some(overlay) },
        };
        Ok(PreparedUpdate { generation: Arc::new(generation), dense })
    }

    /// Puts an update in service through `swap`, which returns the generation that was in service.
    /// Returns when the update is committed, which waits for all passes that began earlier.
    ///
    /// # Errors
    /// The store's errors. The old weights are then in service again, and the updater must not be
    /// used any more.
    pub(crate) fn apply(
        &mut self,
        next: PreparedUpdate<B>,
        swap: impl Fn(Arc<Generation<B>>) -> Arc<Generation<B>>,
    ) -> Result<()> {
        let PreparedUpdate { generation, dense } = next;
        let SparseRows::Updatable { overlay: Some(overlay), .. } = &generation.rows else {
            unreachable!("`prepare` always makes an overlay")
        };
        self.store.remove_rows(&overlay.removed());
        let (ids, rows) = overlay.present();
        self.store.upsert_rows(&ids, &rows)?;
        let before = swap(generation.clone());
        // Make room for the new generation's cache; passes on the old one hold what they use.
        before.cache.clear();
        self.retired.push(before.clone());
        drop(before);
        let before = self.wait_for_retired();
        let committed = self.store.generation();
        if let Err(error) = self.store.commit() {
            // Once readers see the new rows, the old weights cannot be restored.
            if self.handle.generation() == committed
                && let Some(before) = before
            {
                swap(before);
            }
            return Err(error.into());
        }
        let settled = Generation {
            manifest: generation.manifest.clone(),
            model: generation.model.clone(),
            cache: generation.cache.clone(),
            rows: self.committed_rows(),
        };
        drop(generation);
        self.retired.push(swap(Arc::new(settled)));
        self.dense = dense;
        Ok(())
    }

    /// Waits for the passes of all replaced generations. Returns the one that was in service last.
    fn wait_for_retired(&mut self) -> Option<Arc<Generation<B>>> {
        const POLL_INTERVAL: Duration = Duration::from_micros(500);
        let last = self.retired.pop();
        while self.retired.iter().chain(&last).any(|retired| Arc::strong_count(retired) > 1) {
            std::thread::sleep(POLL_INTERVAL);
        }
        self.retired.clear();
        last
    }
}

impl RowOverlay {
    /// The ids of removed rows.
    fn removed(&self) -> Vec<u64> {
        let removed = self.offsets.iter().filter(|(_, offset)| offset.is_none());
        removed.map(|(&id, _)| id).collect()
    }

    /// The ids and rows that the update brings, each once, in its order.
    fn present(&self) -> (Vec<u64>, Vec<f32>) {
        let mut present: Vec<(usize, u64)> =
            self.offsets.iter().filter_map(|(&id, offset)| offset.map(|at| (at, id))).collect();
        present.sort_unstable();
        let row = |&(at, _): &(usize, u64)| &self.rows[at..at + self.dim];
        let ids = present.iter().map(|&(_, id)| id).collect();
        (ids, present.iter().flat_map(row).copied().collect())
    }
}

/// Checks that a model with the manifest `now` can take weights with the manifest `new`.
fn check_compatible(new: &FmManifest, now: &FmManifest) -> Result<()> {
    let differs = [
        ("format", new.format != now.format),
        ("version", new.version != now.version),
        ("configuration", new.config != now.config),
        ("specification", new.spec != now.spec),
        ("numbering of fields", new.field_numbers != now.field_numbers),
    ];
    let Some((what, _)) = differs.into_iter().find(|(_, differs)| *differs) else {
        return Ok(());
    };
    let (new, now) = (&new.version, &now.version);
    refused(format!(
        "its {what} differs from the model in service (the update is for version {new:?}, \
         version {now:?} is in service)"
    ))
}
