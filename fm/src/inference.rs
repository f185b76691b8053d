//! Serving side of the FM: a checkpoint gives TAEs and the main tasks'
//! predictions for requests.
//!
//! It loads only what the TAE needs ("inference pruning", section 3.3.3): no
//! alignment modules, no optimizer state. A history is encoded once and kept for
//! the user's next request (`history`); candidates run over it in micro-batches,
//! one a core. Who is asked together is decided above.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::{Tensor, TensorData, backend::Backend};
use hypercast_store::StoreReader;
use rayon::prelude::*;

use crate::{
    Error, Result,
    batch::{Batch, Batcher},
    checkpoint::{Manifest, load_weights},
    device::{Cpu, DeviceKind},
    example::Example,
    history::{CacheCounts, Encoded, Found, HistoryCache},
    live::{Generation, Live, Place, Rows},
    model::{self, Embedded, FmModel, Forward, drawing},
    sampling::{Selected, parts},
    serving::{ServingBackend, ServingModel},
    spec::{Label, TaskSpec},
    update::Update,
    warm::Warmer,
};

/// What the FM says of the targets of some requests.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FmOutput {
    /// `[rows * tae_dim]`, the target-aware embeddings.
    pub tae: Vec<f32>,
    /// `[rows * main tasks]`: probabilities of binary tasks, values of regressions.
    pub main: Vec<f32>,
}

/// How a loaded FM serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Serving {
    /// Where it runs.
    pub device: DeviceKind,
    /// Bytes of encoded histories that are kept between requests; 0 keeps none.
    pub history_cache_bytes: usize,
    /// Histories of the users asked for last that an update encodes before its weights are in service, at most;
    /// 0 encodes none. They take at most a quarter of the cache.
    pub warm_histories: usize,
}

impl Default for Serving {
    fn default() -> Self {
        Self { device: DeviceKind::Cpu, history_cache_bytes: 256 << 20, warm_histories: 512 }
    }
}

/// A loaded FM, whatever its device.
pub trait FoundationModel: Send + Sync {
    /// What the checkpoint says of itself, as it was loaded. Updates change neither version nor configuration nor
    /// specification.
    fn manifest(&self) -> &Manifest;

    /// What the weights in service say of themselves.
    fn now(&self) -> Arc<Manifest>;

    /// Puts new weights in service. A pass that runs goes on with the old ones; every pass sees one or the other,
    /// and none waits. Histories are encoded anew: those of the users asked for last before the weights are in service
    /// ([`Serving::warm_histories`]; for 5 seconds at most), the others each when it is asked for next. It returns when
    /// the last pass with the old weights has ended.
    ///
    /// # Errors
    /// A model that was not loaded for updates ([`load_live`]), or weights that do not fit it or are damaged: nothing has
    /// changed then. A store that cannot be written to: the old weights are in service, but the
    /// model takes no more updates and is to be loaded again.
    fn update(&self, update: Update) -> Result<()>;

    /// TAEs and main predictions of every target, in order. What one request gets does not depend on the others, nor
    /// on what is cached, up to rounding (1e-5).
    ///
    /// # Errors
    /// An example that does not fit the model.
    fn infer(&self, examples: &[&Example]) -> Result<FmOutput>;

    /// The same in one joint pass over histories and targets, as training has it: nothing is kept or used again.
    ///
    /// # Errors
    /// As [`FoundationModel::infer`].
    fn infer_plain(&self, examples: &[&Example]) -> Result<FmOutput>;

    /// What the history cache was worth since the start.
    fn cache_counts(&self) -> CacheCounts;
}

/// Loads a checkpoint.
///
/// # Errors
/// A checkpoint that is missing, damaged or foreign, or a device that is not in this build.
pub fn load(dir: &Path, serving: Serving) -> Result<Box<dyn FoundationModel>> {
    open(Source { checkpoint: dir, work: None }, serving)
}

/// Loads a checkpoint that takes updates: its rows are copied to `work`, a folder of this process alone, which is
/// replaced.
///
/// # Errors
/// As [`load`]; a folder that cannot be written to.
pub fn load_live(dir: &Path, work: &Path, serving: Serving) -> Result<Box<dyn FoundationModel>> {
    open(Source { checkpoint: dir, work: Some(work) }, serving)
}

/// What a model is loaded from.
#[derive(Debug, Clone, Copy)]
struct Source<'a> {
    checkpoint: &'a Path,
    /// Where rows go that updates bring, if there are updates.
    work: Option<&'a Path>,
}

fn open(from: Source<'_>, serving: Serving) -> Result<Box<dyn FoundationModel>> {
    serving.device.check()?;
    match serving.device {
        DeviceKind::Cpu => Ok(Box::new(Loaded::<Cpu>::open(from, serving)?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Box::new(Loaded::<crate::device::Cuda>::open(from, serving)?)),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => unreachable!("check() refuses it"),
    }
}

/// What a pass may take in memory, about; more requests are several passes.
const SERVING_BYTES: usize = 512 << 20;

/// Candidates a micro-batch, at most: its activations stay in a core's cache.
const MICRO_BATCH: usize = 128;

/// Candidates a micro-batch, at least, where there are as many: fewer make matrix products slow.
const MICRO_BATCH_LEAST: usize = 16;

struct Loaded<B: ServingBackend> {
    /// As it was loaded.
    manifest: Manifest,
    batcher: Batcher,
    device: B::Device,
    /// Held for an instant: to take a generation, or to replace it.
    now: RwLock<Arc<Generation<B>>>,
    /// Where updates are possible. None in the lock once a store has failed.
    live: Option<Mutex<Option<Live<B>>>>,
    history_cache_bytes: usize,
    warmer: Option<Warmer>,
    /// Of requests: whole, known tokens, new tokens. Of updates: warmed tokens.
    counts: [AtomicU64; 4],
}

impl<B: ServingBackend> Loaded<B> {
    fn open(from: Source<'_>, serving: Serving) -> Result<Self> {
        let dir = from.checkpoint;
        let manifest = Manifest::read(dir)?;
        let device = B::Device::default();
        let model = {
            // Weights are drawn before they are replaced, which would change what a trainer draws from its seed.
            let _alone = drawing();
            let fresh = FmModel::new(&manifest.config, &manifest.spec, &device);
            load_weights(fresh, &dir.join("model.safetensors"), &device)?
        };
        let live = from.work.map(|work| Live::open(dir, work)).transpose()?;
        let Serving { history_cache_bytes, warm_histories, .. } = serving;
        let warmer = match &live {
            Some(_) => Warmer::start(warm_histories, history_cache_bytes)?,
            None => None,
        };
        let rows = match &live {
            Some(live) => live.rows(),
            None => Rows::Fixed(Box::new(StoreReader::open(dir.join("store"))?)),
        };
        let now = Generation {
            manifest: Arc::new(manifest.clone()),
            model: Arc::new(ServingModel::new(model)),
            cache: Arc::new(HistoryCache::new(history_cache_bytes)),
            rows,
        };
        Ok(Self {
            batcher: Batcher::new(&manifest.spec, &manifest.config),
            manifest,
            device,
            now: RwLock::new(Arc::new(now)),
            live: live.map(|live| Mutex::new(Some(live))),
            history_cache_bytes,
            warmer,
            counts: Default::default(),
        })
    }

    /// What a pass that begins now goes by.
    fn generation(&self) -> Arc<Generation<B>> {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pass<'a>(&'a self, now: &'a Generation<B>) -> Pass<'a, B> {
        Pass { fm: self, now }
    }

    /// Encodes for a generation that is to come what its first requests are likely to ask for.
    fn warm(&self, next: &Generation<B>)
    where
        ServingModel<B>: Sync,
    {
        let Some(warmer) = &self.warmer else { return };
        match warmer.warm(&self.pass(next), &self.generation().cache) {
            Ok(tokens) => _ = self.counts[3].fetch_add(tokens, Ordering::Relaxed),
            Err(error) => {
                tracing::warn!(%error, "histories are encoded when they are asked for, not before");
            }
        }
    }
}

impl<B: ServingBackend> FoundationModel for Loaded<B>
where
    ServingModel<B>: Sync,
{
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn now(&self) -> Arc<Manifest> {
        self.generation().manifest.clone()
    }

    fn update(&self, update: Update) -> Result<()> {
        let Some(live) = &self.live else {
            return Err(Error::Update("the model was loaded without a place for new rows".into()));
        };
        let mut slot = live.lock().map_err(|_| Error::Update("an earlier one failed".into()))?;
        let Some(mut live) = slot.take() else {
            let why = "an earlier one could not be written; load the model again";
            return Err(Error::Update(why.into()));
        };
        let history_cache_bytes = self.history_cache_bytes;
        let place = Place { device: &self.device, history_cache_bytes };
        let next = match live.prepare(update, &self.generation(), place) {
            Ok(next) => next,
            Err(error) => {
                *slot = Some(live);
                return Err(error);
            }
        };
        let put = |generation| {
            let mut now = self.now.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *now, generation)
        };
        self.warm(&next.generation);
        live.replace(next, put).inspect_err(|_| self.generation().cache.give_up(0))?;
        *slot = Some(live);
        Ok(())
    }

    fn infer(&self, examples: &[&Example]) -> Result<FmOutput> {
        examples.iter().try_for_each(|example| self.batcher.check(example))?;
        let now = self.generation();
        let pass = self.pass(&now);
        let mut output = FmOutput::default();
        for part in parts(examples, &self.manifest.config, examples.len(), SERVING_BYTES) {
            let histories = pass.histories(part)?;
            let passes = micro_batches(part, rayon::current_num_threads());
            let said: Vec<Result<FmOutput>> =
                passes.par_iter().map(|slices| pass.score(part, slices, &histories)).collect();
            for said in said {
                let said = said?;
                output.tae.extend(said.tae);
                output.main.extend(said.main);
            }
        }
        Ok(output)
    }

    fn infer_plain(&self, examples: &[&Example]) -> Result<FmOutput> {
        let now = self.generation();
        let pass = self.pass(&now);
        let mut output = FmOutput::default();
        for part in parts(examples, &self.manifest.config, examples.len(), SERVING_BYTES) {
            let batch = self.batcher.batch(part, &now.manifest.statistics)?;
            if batch.targets() == 0 {
                continue;
            }
            let attention = model::attention(&self.manifest.config, &batch)?;
            let forward = now.model.model.forward(pass.embed(&batch), &batch, &attention);
            let said = self::output(forward, self.manifest.spec.main_tasks());
            output.tae.extend(said.tae);
            output.main.extend(said.main);
        }
        Ok(output)
    }

    fn cache_counts(&self) -> CacheCounts {
        let [whole, known_tokens, new_tokens, warmed_tokens] =
            self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let bytes = self.generation().cache.bytes();
        CacheCounts { whole, known_tokens, new_tokens, warmed_tokens, bytes }
    }
}

/// A pass, with one generation of weights from its beginning to its end.
pub(crate) struct Pass<'a, B: ServingBackend> {
    fm: &'a Loaded<B>,
    pub(crate) now: &'a Generation<B>,
}

impl<B: ServingBackend> Pass<'_, B>
where
    ServingModel<B>: Sync,
{
    /// The encoded history of each example: what the cache lacks is encoded in one pass.
    fn histories(&self, examples: &[&Example]) -> Result<Vec<Arc<Encoded<B>>>> {
        if let Some(warmer) = &self.fm.warmer {
            examples.iter().for_each(|example| warmer.touch(example.user.id));
        }
        let window = self.fm.manifest.config.history_window();
        let first = |example: &Example| window.first(&example.history);
        let mut found: Vec<Found<B>> =
            examples.iter().map(|example| self.now.cache.find(example, first(example))).collect();
        let mut selected = Vec::new();
        let mut growing: Vec<&mut Encoded<B>> = Vec::new();
        let (mut whole, mut known_tokens) = (0, 0);
        for (example, found) in examples.iter().zip(&mut found) {
            match found {
                Found::Whole(history) => {
                    whole += 1;
                    known_tokens += history.events.len();
                }
                Found::Prefix(history) => {
                    known_tokens += history.events.len();
                    let from = first(example) + history.events.len();
                    let events = (from..example.history.len()).collect();
                    selected.push(Selected { example, events, targets: Vec::new() });
                    history.events.extend_from_slice(&example.history[from..]);
                    growing.push(history);
                }
            }
        }
        let new_tokens: usize = selected.iter().map(|selected| selected.events.len()).sum();
        for (count, more) in self.fm.counts.iter().zip([whole, known_tokens, new_tokens]) {
            count.fetch_add(more as u64, Ordering::Relaxed);
        }
        if new_tokens > 0 {
            self.encode(&selected, &mut growing)?;
        }
        let keep = |(found, example): (Found<B>, &&Example)| match found {
            Found::Whole(history) => history,
            Found::Prefix(history) => {
                let history = Arc::from(history);
                self.now.cache.keep(example.user.id, Arc::clone(&history));
                history
            }
        };
        Ok(found.into_iter().zip(examples).map(keep).collect())
    }

    /// Encodes the selected events, which follow what is encoded already; all of them are in `events` there.
    pub(crate) fn encode(
        &self,
        selected: &[Selected<'_>],
        growing: &mut [&mut Encoded<B>],
    ) -> Result<()> {
        let batch = self.fm.batcher.lay_out(selected, &self.now.manifest.statistics);
        let attention = model::attention(&self.fm.manifest.config, &batch)?;
        self.now.model.encode(self.embed(&batch), &batch, &attention, growing);
        Ok(())
    }

    /// What some targets are over their histories.
    fn score(
        &self,
        examples: &[&Example],
        pass: &[Slice],
        histories: &[Arc<Encoded<B>>],
    ) -> Result<FmOutput> {
        let selected: Vec<Selected<'_>> = pass
            .iter()
            .map(|slice| Selected {
                example: examples[slice.example],
                events: Vec::new(),
                targets: slice.targets.clone().map(|target| (target, 1.0)).collect(),
            })
            .collect();
        let histories: Vec<&Encoded<B>> =
            pass.iter().map(|slice| &*histories[slice.example]).collect();
        let batch = self.fm.batcher.lay_out(&selected, &self.now.manifest.statistics);
        let attention = model::attention(&self.fm.manifest.config, &batch)?;
        let forward = self.now.model.score(self.embed(&batch), &batch, &attention, &histories);
        Ok(output(forward, self.fm.manifest.spec.main_tasks()))
    }

    fn embed(&self, batch: &Batch) -> Embedded<B> {
        let dim = self.fm.manifest.config.embedding_dim;
        let mut rows = vec![0.0; batch.keys.len() * dim];
        self.now.rows.gather(&batch.keys, &mut rows);
        Gathered::new(batch, &rows, dim).tensors(&self.fm.device)
    }
}

/// Some targets of one example.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slice {
    example: usize,
    targets: Range<usize>,
}

/// Cuts the targets of examples, in order, into passes of about equal size that keep `threads` busy.
fn micro_batches(examples: &[&Example], threads: usize) -> Vec<Vec<Slice>> {
    let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
    let passes = rows.div_ceil(MICRO_BATCH).next_multiple_of(threads.max(1));
    let size = rows.div_ceil(passes.max(1)).max(MICRO_BATCH_LEAST);
    let mut batches: Vec<Vec<Slice>> = Vec::new();
    let mut room = 0;
    for (index, example) in examples.iter().enumerate() {
        let mut from = 0;
        while from < example.targets.len() {
            if room == 0 {
                batches.push(Vec::new());
                room = size;
            }
            let count = room.min(example.targets.len() - from);
            let slice = Slice { example: index, targets: from..from + count };
            batches.last_mut().expect("one was pushed").push(slice);
            (from, room) = (from + count, room - count);
        }
    }
    batches
}

/// The sparse rows of a batch, laid out for the model: see [`Embedded`].
#[derive(Debug, Clone)]
pub(crate) struct Gathered {
    tokens: TensorData,
    profiles: Option<TensorData>,
}

impl Gathered {
    /// `rows` `[keys, dim]` are those of the batch's distinct keys.
    pub(crate) fn new(batch: &Batch, rows: &[f32], dim: usize) -> Self {
        let gather = |index: &[u32], places: usize| {
            let mut flat = Vec::with_capacity(index.len() * dim);
            for &index in index {
                let at = index as usize * dim;
                flat.extend_from_slice(&rows[at..at + dim]);
            }
            TensorData::new(flat, [places, index.len() / places * dim])
        };
        Self {
            tokens: gather(&batch.key_index, batch.history_tokens() + batch.targets()),
            profiles: (!batch.profile_index.is_empty())
                .then(|| gather(&batch.profile_index, batch.targets())),
        }
    }

    /// On a device.
    pub(crate) fn tensors<B: Backend>(self, device: &B::Device) -> Embedded<B> {
        let tensor = |data| Tensor::from_data(data, device);
        Embedded { tokens: tensor(self.tokens), profiles: self.profiles.map(tensor) }
    }
}

/// Tensors → numbers, with the sigmoid on binary tasks.
pub(crate) fn output<B: Backend>(forward: Forward<B>, tasks: &[TaskSpec]) -> FmOutput {
    let mut main = numbers(forward.main);
    for (index, value) in main.iter_mut().enumerate() {
        if matches!(tasks[index % tasks.len()].label, Label::Action(_)) {
            *value = 1.0 / (1.0 + (-*value).exp());
        }
    }
    FmOutput { tae: numbers(forward.tae), main }
}

fn numbers<B: Backend>(tensor: Tensor<B, 2>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().expect("converted to f32")
}
