//! A served model that takes new weights while it answers.
//!
//! A pass takes a [`Generation`] when it begins and keeps it to its end, so it sees all of the old weights or all of
//! the new ones, and never waits. New rows first lie above the store, in the generation that brings them; once
//! no pass of an earlier generation is left they are committed below, where nobody can tell the difference, and the
//! next generation goes without them. Histories were encoded with the weights of one generation and are kept by it
//! alone, or for it (`warm`). Who may update what, and how updates travel, is decided above.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use hypercast_store::{RowFormat, ServingStore, StoreHandle, StoreReader, Verify};

use crate::{
    Error, Result,
    checkpoint::{Manifest, Tensors, place_weights, read_tensors},
    history::HistoryCache,
    model::FmModel,
    serving::{ServingBackend, ServingModel},
    update::Update,
};

/// All that an answer depends on.
pub(crate) struct Generation<B: ServingBackend> {
    pub(crate) manifest: Arc<Manifest>,
    pub(crate) model: Arc<ServingModel<B>>,
    pub(crate) cache: Arc<HistoryCache<B>>,
    pub(crate) rows: Rows,
}

/// Where sparse rows are.
#[derive(Debug)]
pub(crate) enum Rows {
    /// In a checkpoint.
    Fixed(Box<StoreReader>),
    /// In a store that takes new ones.
    Live {
        below: StoreHandle,
        /// What differs from `below`, or will be there soon.
        above: Option<Arc<Above>>,
    },
}

impl Rows {
    /// The rows of `ids` to `out`, zeros for those that have none.
    pub(crate) fn gather(&self, ids: &[u64], out: &mut [f32]) {
        match self {
            Rows::Fixed(store) => {
                store.gather(ids, out);
            }
            Rows::Live { below, above } => {
                below.gather(ids, out);
                if let Some(above) = above {
                    above.overlay(ids, out);
                }
            }
        }
    }
}

/// The rows of an update.
#[derive(Debug)]
pub(crate) struct Above {
    dim: usize,
    /// Where a row is; none where it is gone.
    places: HashMap<u64, Option<usize>>,
    rows: Vec<f32>,
}

impl Above {
    /// As a store of this format will have them.
    fn new(update: &Update, removed: &[u64], format: RowFormat) -> Above {
        let dim = update.manifest.config.embedding_dim;
        let mut rows = update.rows.clone();
        rows.chunks_exact_mut(dim).for_each(|row| format.round(row));
        let there = update.ids.iter().enumerate().map(|(at, &id)| (id, Some(at * dim)));
        let places = there.chain(removed.iter().map(|&id| (id, None))).collect();
        Above { dim, places, rows }
    }

    fn overlay(&self, ids: &[u64], out: &mut [f32]) {
        for (id, out) in ids.iter().zip(out.chunks_exact_mut(self.dim)) {
            match self.places.get(id) {
                Some(Some(at)) => out.copy_from_slice(&self.rows[*at..at + self.dim]),
                Some(None) => out.fill(0.0),
                None => {}
            }
        }
    }
}

/// What updates work on; one at a time.
pub(crate) struct Live<B: ServingBackend> {
    store: ServingStore,
    handle: StoreHandle,
    /// The dense weights in service.
    dense: Tensors,
    /// Generations that were replaced and may still have passes.
    retired: Vec<Arc<Generation<B>>>,
}

/// An update that is ready to be put in service.
pub(crate) struct Next<B: ServingBackend> {
    pub(crate) generation: Arc<Generation<B>>,
    dense: Tensors,
}

impl<B: ServingBackend> Live<B> {
    /// Copies the store of the checkpoint in `dir` to `work`, replacing what is there, to take new rows.
    pub(crate) fn open(dir: &Path, work: &Path) -> Result<Self> {
        if work.exists() {
            let failed = |error| crate::checkpoint::failed(work, error);
            std::fs::remove_dir_all(work).map_err(failed)?;
        }
        let from = StoreReader::open(dir.join("store"))?;
        from.snapshot_into(work, from.format())?;
        let mut store = ServingStore::open(work, Verify::Journal)?;
        let handle = store.handle()?;
        let dense = read_tensors(&dir.join("model.safetensors"))?;
        Ok(Self { store, handle, dense, retired: Vec::new() })
    }

    /// The rows that are committed.
    pub(crate) fn rows(&self) -> Rows {
        Rows::Live { below: self.handle.clone(), above: None }
    }

    /// Checks an update and makes the generation that it leads to; nothing is in service yet.
    pub(crate) fn prepare(
        &self,
        update: Update,
        now: &Generation<B>,
        place: Place<'_, B>,
    ) -> Result<Next<B>> {
        fits(&update.manifest, &now.manifest)?;
        update.check()?;
        if update.whole {
            update.is_complete(&self.dense)?;
        }
        let mut dense = self.dense.clone();
        update.place(&mut dense)?;
        let model: FmModel<B> = place_weights(now.model.model.clone(), dense.clone(), place.device)
            .map_err(Error::Update)?;
        let mut removed = update.removed.clone();
        if update.whole {
            let sent: std::collections::HashSet<u64> = update.ids.iter().copied().collect();
            removed.extend(self.store.ids().filter(|id| !sent.contains(id)));
        }
        let above = Arc::new(Above::new(&update, &removed, self.store.format()));
        let generation = Generation {
            manifest: Arc::new(update.manifest),
            model: Arc::new(ServingModel::new(model)),
            cache: Arc::new(HistoryCache::new(place.history_cache_bytes)),
            rows: Rows::Live { below: self.handle.clone(), above: Some(above) },
        };
        Ok(Next { generation: Arc::new(generation), dense })
    }

    /// Puts an update in service, through `put`, which gives what was in service. It returns once the update is
    /// committed, which waits for the passes that began before.
    ///
    /// # Errors
    /// What the store says; the old weights are then in service again, and no update is taken any more.
    pub(crate) fn replace(
        &mut self,
        next: Next<B>,
        put: impl Fn(Arc<Generation<B>>) -> Arc<Generation<B>>,
    ) -> Result<()> {
        let Next { generation, dense } = next;
        let Rows::Live { above: Some(above), .. } = &generation.rows else {
            unreachable!("an update brings rows, be it none")
        };
        self.store.remove_rows(&above.gone());
        let (ids, rows) = above.there();
        self.store.upsert_rows(&ids, &rows)?;
        let before = put(generation.clone());
        // The new generation has the room; a pass that still runs with the old one has what it needs.
        before.cache.clear();
        self.retired.push(before.clone());
        drop(before);
        let before = self.wait();
        let committed = self.store.generation();
        if let Err(error) = self.store.commit() {
            // Rows that handles see cannot be taken back; where they do not yet, the old weights can.
            if self.handle.generation() == committed
                && let Some(before) = before
            {
                put(before);
            }
            return Err(error.into());
        }
        let settled = Generation {
            manifest: generation.manifest.clone(),
            model: generation.model.clone(),
            cache: generation.cache.clone(),
            rows: self.rows(),
        };
        drop(generation);
        self.retired.push(put(Arc::new(settled)));
        self.dense = dense;
        Ok(())
    }

    /// Waits for the passes of all generations that were replaced; gives the one that was in service last.
    fn wait(&mut self) -> Option<Arc<Generation<B>>> {
        const LOOK_EVERY: Duration = Duration::from_micros(500);
        let last = self.retired.pop();
        while self.retired.iter().chain(&last).any(|retired| Arc::strong_count(retired) > 1) {
            std::thread::sleep(LOOK_EVERY);
        }
        self.retired.clear();
        last
    }
}

/// Where and how a model is prepared.
pub(crate) struct Place<'a, B: ServingBackend> {
    pub(crate) device: &'a B::Device,
    pub(crate) history_cache_bytes: usize,
}

impl Above {
    fn gone(&self) -> Vec<u64> {
        let gone = self.places.iter().filter(|(_, place)| place.is_none());
        gone.map(|(&id, _)| id).collect()
    }

    /// Ids and rows, each once, in the order of the update.
    fn there(&self) -> (Vec<u64>, Vec<f32>) {
        let mut places: Vec<(usize, u64)> =
            self.places.iter().filter_map(|(&id, place)| place.map(|at| (at, id))).collect();
        places.sort_unstable();
        let row = |&(at, _): &(usize, u64)| &self.rows[at..at + self.dim];
        (places.iter().map(|&(_, id)| id).collect(), places.iter().flat_map(row).copied().collect())
    }
}

/// Whether a model of `now` can take the weights of `new`.
fn fits(new: &Manifest, now: &Manifest) -> Result<()> {
    let what = match () {
        () if new.format != now.format => "format",
        () if new.version != now.version => "version",
        () if new.config != now.config => "configuration",
        () if new.spec != now.spec => "specification",
        () => return Ok(()),
    };
    let (new, now) = (&new.version, &now.version);
    Err(Error::Update(format!("its {what} is another one (of {new:?}, in service is {now:?})")))
}
