//! Inference: a loaded checkpoint computes TAEs and predictions of the main tasks for requests.
//!
//! Only what the TAE needs is loaded ("inference pruning", section 3.3.3): no alignment modules and
//! no optimizer state. A history is encoded once and cached for the user's next request
//! ([`crate::history`]); candidates are scored against it in micro-batches, one per core. The
//! caller decides which requests form a batch.

use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, RwLock, TryLockError,
        atomic::{AtomicU64, Ordering},
    },
};

use burn::tensor::{Tensor, backend::Backend};
use hypercast_store::StoreReader;
use rayon::prelude::*;

use crate::{
    Result,
    batch::BatchBuilder,
    cache_warmup::CacheWarmer,
    checkpoint::{FmManifest, current_checkpoint, load_weights},
    device::{Cpu, Cuda, DeviceKind, Wgpu},
    example::Example,
    growth::{SpecGrowth, growth_of},
    history::{CacheCounts, CacheLookup, EncodedHistory, HistoryCache},
    label_scale::LabelScales,
    live_model::{Generation, LiveUpdater, SparseRows},
    model::{self, EmbeddedBatch, FmModel, ModelOutput, lock_weight_rng},
    sampling::{ExampleSelection, split_by_memory, unweighted},
    serving::{ServingBackend, ServingModel},
    serving_batch::{EmbeddedRows, SharedRanges},
    spec::{TaskLabel, TaskSpec},
    training_only::ReadFor,
    update::{WeightUpdate, refused},
};

/// TAEs and predictions for the targets of some requests, in order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FmOutput {
    /// `[rows * tae_width]`: the target-aware embeddings.
    pub tae: Vec<f32>,
    /// `[rows * main tasks]`: probabilities of binary tasks, values of regressions in the unit of
    /// their labels.
    pub main: Vec<f32>,
}

/// Settings of a loaded FM.
#[derive(Debug, Clone, PartialEq)]
pub struct FmServingOptions {
    /// The device to run on.
    pub device: DeviceKind,
    /// The most bytes of encoded histories that are cached between requests; 0 caches none.
    pub history_cache_bytes: usize,
    /// The most histories of recent users that an update encodes with its new weights before it
    /// puts them in service; 0 encodes none. They take at most a quarter of the cache.
    pub warmup_histories: usize,
    /// How data has grown: a checkpoint of what it was before, and updates of it, are taken over.
    pub growths: Arc<[SpecGrowth]>,
}

impl FmOutput {
    fn append(&mut self, other: FmOutput) {
        self.tae.extend(other.tae);
        self.main.extend(other.main);
    }
}

impl Default for FmServingOptions {
    fn default() -> Self {
        Self {
            device: DeviceKind::Cpu,
            history_cache_bytes: 256 << 20,
            warmup_histories: 512,
            growths: Arc::default(),
        }
    }
}

/// A loaded FM, on any device.
pub trait FoundationModel: Send + Sync {
    /// The manifest of the checkpoint that was loaded. Updates change neither version,
    /// configuration nor specification.
    fn manifest(&self) -> &FmManifest;

    /// The manifest of the weights in service, which updates replace.
    fn current_manifest(&self) -> Arc<FmManifest>;

    /// Puts new weights in service. Every inference pass uses either the old or the new weights
    /// from its beginning to its end, and none waits. Cached histories are encoded again: those of
    /// recent users before the weights are in service ([`FmServingOptions::warmup_histories`], for
    /// at most 5 seconds), the others at the user's next request. Returns when the last pass with
    /// the old weights has ended.
    ///
    /// # Errors
    /// A model that was not loaded by [`load_updatable`], or an update that is damaged or does not
    /// match the model; nothing has changed then. A store that cannot be written, or a file of it
    /// that was cut: the old weights stay in service, but the model accepts no further updates and
    /// must be loaded again, which [`FoundationModel::check_files`] says from then on.
    fn update(&self, update: WeightUpdate) -> Result<()>;

    /// TAEs and main predictions of every target, in order. Batching and caching do not change the
    /// results beyond rounding (1e-5).
    ///
    /// # Errors
    /// An example that does not match the model's specification, or a file of the checkpoint that
    /// was cut ([`hypercast_store::Error::FileLost`]).
    fn infer(&self, examples: &[&Example]) -> Result<FmOutput>;

    /// The same in one joint pass over histories and targets, as in training, without the cache.
    ///
    /// # Errors
    /// As [`FoundationModel::infer`].
    fn infer_uncached(&self, examples: &[&Example]) -> Result<FmOutput>;

    /// Hits and misses of the history cache since the model was loaded.
    fn cache_counts(&self) -> CacheCounts;

    /// Looks whether the files that are read while the model serves are whole.
    ///
    /// # Errors
    /// [`hypercast_store::Error::FileLost`] with the first file that was cut. Requests are answered
    /// again once it is as it was. [`crate::Error::Update`] after an update that could not be
    /// written, until the model is loaded again.
    fn check_files(&self) -> Result<()>;
}

/// Loads a checkpoint that takes no updates.
///
/// # Errors
/// A checkpoint that is missing, damaged or of another format, or a device that is not in this
/// build.
pub fn load(dir: &Path, serving: FmServingOptions) -> Result<Box<dyn FoundationModel>> {
    open(dir, None, serving)
}

/// Loads a checkpoint that takes updates. Its sparse rows are copied to the folder `work`, which is
/// replaced and which only this process may use.
///
/// # Errors
/// As [`load`], and a folder that cannot be written.
pub fn load_updatable(
    dir: &Path,
    work: &Path,
    serving: FmServingOptions,
) -> Result<Box<dyn FoundationModel>> {
    open(dir, Some(work), serving)
}

fn open(
    dir: &Path,
    work: Option<&Path>,
    serving: FmServingOptions,
) -> Result<Box<dyn FoundationModel>> {
    serving.device.check()?;
    let dir = &current_checkpoint(dir);
    match serving.device {
        DeviceKind::Cpu => Ok(Box::new(LoadedModel::<Cpu>::open(dir, work, serving)?)),
        DeviceKind::Cuda => Ok(Box::new(LoadedModel::<Cuda>::open(dir, work, serving)?)),
        DeviceKind::Wgpu => Ok(Box::new(LoadedModel::<Wgpu>::open(dir, work, serving)?)),
    }
}

/// Approximate limit on the memory of a pass; more requests are processed in several passes.
const MAX_PASS_BYTES: usize = 512 << 20;

/// The most candidates in a micro-batch, so that its activations stay in a core's cache.
const MAX_MICRO_BATCH: usize = 128;

/// The fewest candidates in a micro-batch, if there are as many: matrix products with fewer rows
/// are slow.
const MIN_MICRO_BATCH: usize = 16;

const PANICKED: &str = "an earlier update panicked; load the model again";

struct LoadedModel<B: ServingBackend> {
    /// The manifest of the loaded checkpoint.
    manifest: FmManifest,
    batch_builder: BatchBuilder,
    /// The generation in service. The lock is only held to clone or replace the pointer.
    current: RwLock<Arc<Generation<B>>>,
    /// Present if the model takes updates; once its store has failed, the reason is in its place.
    updater: Option<Mutex<std::result::Result<LiveUpdater<B>, String>>>,
    history_cache_bytes: usize,
    warmer: Option<CacheWarmer>,
    /// Of requests: whole, known tokens, new tokens. Of updates: warmed tokens.
    counts: [AtomicU64; 4],
}

impl<B: ServingBackend> LoadedModel<B> {
    fn open(dir: &Path, work: Option<&Path>, serving: FmServingOptions) -> Result<Self> {
        let mut manifest = FmManifest::read(dir)?;
        let growth = growth_of(&serving.growths, &manifest.spec);
        if let Some(growth) = &growth {
            growth.manifest(&mut manifest);
        }
        let dim = manifest.config.embedding_dim;
        let model = {
            // The new model draws weights before they are replaced. Without the lock, a trainer
            // that draws at the same time would get other weights from its seed.
            let _rng = lock_weight_rng();
            let fresh = FmModel::new(&manifest.config, &manifest.spec, &B::Device::default());
            load_weights(fresh, &dir.join("model.safetensors"), growth.as_ref(), dim)?
        };
        let FmServingOptions { history_cache_bytes, warmup_histories, growths, .. } = serving;
        let updater = work.map(|work| LiveUpdater::open(dir, work, &model, growths)).transpose()?;
        let warmer = match &updater {
            Some(_) => CacheWarmer::start(warmup_histories, history_cache_bytes)?,
            None => None,
        };
        let rows = match &updater {
            Some(updater) => updater.committed_rows(),
            None => SparseRows::Fixed(Box::new(StoreReader::open(dir.join("store"))?)),
        };
        let generation = Generation {
            manifest: Arc::new(manifest.clone()),
            model: Arc::new(ServingModel::new(
                model,
                SharedRanges::new(&manifest.config, &manifest.spec),
            )),
            cache: Arc::new(HistoryCache::new(history_cache_bytes)),
            rows,
        };
        Ok(Self {
            batch_builder: BatchBuilder {
                field_numbers: manifest.field_numbers.clone(),
                ..BatchBuilder::new(&manifest.spec, &manifest.config, manifest.row_keys())
            },
            manifest,
            current: RwLock::new(Arc::new(generation)),
            updater: updater.map(|updater| Mutex::new(Ok(updater))),
            history_cache_bytes,
            warmer,
            counts: Default::default(),
        })
    }

    /// The generation in service, for a pass that begins now.
    fn generation(&self) -> Arc<Generation<B>> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Encodes recent users' histories for the next generation.
    fn warm_up(&self, next: &Generation<B>)
    where
        ServingModel<B>: Sync,
    {
        let Some(warmer) = &self.warmer else { return };
        match warmer
            .warm_up(&InferencePass { fm: self, generation: next }, &self.generation().cache)
        {
            Ok(tokens) => _ = self.counts[3].fetch_add(tokens, Ordering::Relaxed),
            Err(error) => {
                tracing::warn!(%error, "cannot encode histories ahead of an update; they are encoded at the next request");
            }
        }
    }
}

impl<B: ServingBackend> FoundationModel for LoadedModel<B>
where
    ServingModel<B>: Sync,
{
    fn manifest(&self) -> &FmManifest {
        &self.manifest
    }

    fn current_manifest(&self) -> Arc<FmManifest> {
        self.generation().manifest.clone()
    }

    fn update(&self, update: WeightUpdate) -> Result<()> {
        let Some(updater) = &self.updater else {
            return refused("the model was loaded without a work folder; load it for updates");
        };
        let Ok(mut slot) = updater.lock() else {
            return refused(PANICKED);
        };
        let updater = match &mut *slot {
            Ok(updater) => updater,
            Err(why) => return refused(why.clone()),
        };
        let next = updater.prepare(update, &self.generation(), self.history_cache_bytes)?;
        let swap = |generation| {
            let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, generation)
        };
        self.warm_up(&next.generation);
        updater.apply(next, swap).inspect_err(|error| {
            *slot = Err(format!(
                "an update could not be written ({error}); the weights before it stay in service \
                 until the model is loaded again"
            ));
            self.generation().cache.reserve(0);
        })
    }

    fn infer(&self, examples: &[&Example]) -> Result<FmOutput> {
        examples.iter().try_for_each(|example| self.batch_builder.check(example))?;
        let generation = self.generation();
        let pass = InferencePass { fm: self, generation: &generation };
        let mut output = FmOutput::default();
        let FmManifest { config, spec, .. } = &self.manifest;
        for part in split_by_memory(examples, config, spec, examples.len(), MAX_PASS_BYTES) {
            let histories = pass.histories(part)?;
            let passes = micro_batches(part, rayon::current_num_threads());
            let outputs: Vec<Result<FmOutput>> =
                passes.par_iter().map(|slices| pass.score(part, slices, &histories)).collect();
            for scored in outputs {
                output.append(scored?);
            }
        }
        Ok(output)
    }

    fn infer_uncached(&self, examples: &[&Example]) -> Result<FmOutput> {
        let generation = self.generation();
        let pass = InferencePass { fm: self, generation: &generation };
        let mut output = FmOutput::default();
        let FmManifest { config, spec, .. } = &self.manifest;
        for part in split_by_memory(examples, config, spec, examples.len(), MAX_PASS_BYTES) {
            let batch = self.batch_builder.build(part, &generation.manifest.statistics)?;
            if batch.targets() == 0 {
                continue;
            }
            let attention = model::batch_attention(&self.manifest.config, &batch)?;
            let rows = model::rows_of(&batch, pass.gather(&batch.keys)?);
            let embedded = EmbeddedBatch::new(&batch, &rows);
            let forward = generation.model.model.forward(embedded, &batch, &attention);
            let scales = &generation.manifest.statistics.labels;
            output.append(to_output(forward, self.manifest.spec.main_tasks(), scales));
        }
        Ok(output)
    }

    fn cache_counts(&self) -> CacheCounts {
        let [full_hits, cached_tokens, encoded_tokens, warmup_tokens] =
            self.counts.each_ref().map(|count| count.load(Ordering::Relaxed));
        let bytes = self.generation().cache.bytes();
        CacheCounts { full_hits, cached_tokens, encoded_tokens, warmup_tokens, bytes }
    }

    fn check_files(&self) -> Result<()> {
        self.generation().rows.check_files()?;
        // An update that goes on has not failed.
        match self.updater.as_ref().map(Mutex::try_lock) {
            Some(Err(TryLockError::Poisoned(_))) => refused(PANICKED),
            Some(Ok(slot)) => slot.as_ref().map_or_else(|why| refused(why.clone()), |_| Ok(())),
            Some(Err(TryLockError::WouldBlock)) | None => Ok(()),
        }
    }
}

/// An inference pass, which uses one generation of weights from its beginning to its end.
pub(crate) struct InferencePass<'a, B: ServingBackend> {
    fm: &'a LoadedModel<B>,
    pub(crate) generation: &'a Generation<B>,
}

impl<B: ServingBackend> InferencePass<'_, B>
where
    ServingModel<B>: Sync,
{
    /// The encoded history of each example. What the cache lacks is encoded in one pass.
    fn histories(&self, examples: &[&Example]) -> Result<Vec<Arc<EncodedHistory<B>>>> {
        if let Some(warmer) = &self.fm.warmer {
            examples.iter().for_each(|example| warmer.recent.record(example.user.id));
        }
        let window = self.fm.manifest.config.history_window();
        let first = |example: &Example| window.first_index(&example.history);
        let mut found: Vec<CacheLookup<B>> = examples
            .iter()
            .map(|example| self.generation.cache.lookup(example, first(example)))
            .collect();
        let mut selected = Vec::new();
        let mut growing: Vec<&mut EncodedHistory<B>> = Vec::new();
        let (mut full_hits, mut cached_tokens) = (0, 0);
        for (example, found) in examples.iter().zip(&mut found) {
            match found {
                CacheLookup::Complete(history) => {
                    full_hits += 1;
                    cached_tokens += history.events.len();
                }
                CacheLookup::Prefix(history) => {
                    cached_tokens += history.events.len();
                    let from = first(example) + history.events.len();
                    let events = (from..example.history.len()).collect();
                    selected.push(ExampleSelection {
                        example,
                        events,
                        targets: Vec::new(),
                        reader: ReadFor::Prediction,
                    });
                    history.events.extend_from_slice(&example.history[from..]);
                    growing.push(history);
                }
            }
        }
        let encoded_tokens: usize = selected.iter().map(|selected| selected.events.len()).sum();
        for (count, more) in self.fm.counts.iter().zip([full_hits, cached_tokens, encoded_tokens]) {
            count.fetch_add(more as u64, Ordering::Relaxed);
        }
        if encoded_tokens > 0 {
            self.encode(&selected, &mut growing)?;
        }
        let keep = |(found, example): (CacheLookup<B>, &&Example)| match found {
            CacheLookup::Complete(history) => history,
            CacheLookup::Prefix(history) => {
                let history = Arc::from(history);
                self.generation.cache.insert(example.user.id, Arc::clone(&history));
                history
            }
        };
        Ok(found.into_iter().zip(examples).map(keep).collect())
    }

    /// Encodes the selected events and appends them to `growing`, whose `events` already include
    /// them.
    pub(crate) fn encode(
        &self,
        selected: &[ExampleSelection<'_>],
        growing: &mut [&mut EncodedHistory<B>],
    ) -> Result<()> {
        let statistics = &self.generation.manifest.statistics;
        let batch = self.fm.batch_builder.serving_batch(selected, statistics);
        let attention = model::serving_attention(&self.fm.manifest.config, &batch)?;
        let rows = self.gather(&batch.keys)?;
        let inputs = batch.inputs(&self.fm.batch_builder, self.embedded(&rows));
        self.generation.model.encode(inputs, &batch, &attention, growing);
        Ok(())
    }

    /// The outputs for some targets over their encoded histories.
    fn score(
        &self,
        examples: &[&Example],
        pass: &[TargetSlice],
        histories: &[Arc<EncodedHistory<B>>],
    ) -> Result<FmOutput> {
        let selected: Vec<ExampleSelection<'_>> = pass
            .iter()
            .map(|slice| ExampleSelection {
                example: examples[slice.example],
                events: Vec::new(),
                targets: unweighted(slice.targets.clone()),
                reader: ReadFor::Prediction,
            })
            .collect();
        let histories: Vec<&EncodedHistory<B>> =
            pass.iter().map(|slice| &*histories[slice.example]).collect();
        let statistics = &self.generation.manifest.statistics;
        let batch = self.fm.batch_builder.serving_batch(&selected, statistics);
        let attention = model::serving_attention(&self.fm.manifest.config, &batch)?;
        let rows = self.gather(&batch.keys)?;
        let inputs = batch.inputs(&self.fm.batch_builder, self.embedded(&rows));
        let forward = self.generation.model.score(inputs, &batch, &attention, &histories);
        Ok(to_output(forward, self.fm.manifest.spec.main_tasks(), &statistics.labels))
    }

    /// The rows of store keys.
    fn gather(&self, keys: &[u64]) -> Result<Vec<f32>> {
        let mut rows = vec![0.0; keys.len() * self.fm.manifest.config.embedding_dim];
        self.generation.rows.gather(keys, &mut rows)?;
        Ok(rows)
    }

    fn embedded<'r>(&self, rows: &'r [f32]) -> EmbeddedRows<'r> {
        EmbeddedRows { rows, dim: self.fm.manifest.config.embedding_dim }
    }
}

/// A range of targets of one example.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TargetSlice {
    example: usize,
    targets: Range<usize>,
}

/// Splits the targets of examples, in order, into micro-batches of similar size that occupy
/// `threads`.
fn micro_batches(examples: &[&Example], threads: usize) -> Vec<Vec<TargetSlice>> {
    let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
    let passes = rows.div_ceil(MAX_MICRO_BATCH).next_multiple_of(threads.max(1));
    let size = rows.div_ceil(passes.max(1)).max(MIN_MICRO_BATCH);
    let mut batches: Vec<Vec<TargetSlice>> = Vec::new();
    let mut room = 0;
    for (index, example) in examples.iter().enumerate() {
        let mut from = 0;
        while from < example.targets.len() {
            if room == 0 {
                batches.push(Vec::new());
                room = size;
            }
            let count = room.min(example.targets.len() - from);
            let slice = TargetSlice { example: index, targets: from..from + count };
            batches.last_mut().expect("one was pushed").push(slice);
            (from, room) = (from + count, room - count);
        }
    }
    batches
}

/// Converts a model's output to numbers: probabilities and values, not logits.
pub(crate) fn to_output<B: Backend>(
    forward: ModelOutput<B>,
    tasks: &[TaskSpec],
    scales: &LabelScales,
) -> FmOutput {
    let mut main = numbers(forward.main);
    for (index, value) in main.iter_mut().enumerate() {
        *value = prediction(&tasks[index % tasks.len()], scales, *value);
    }
    FmOutput { tae: numbers(forward.tae), main }
}

/// The prediction of a head's output: the probability of a binary task, the value of a regression
/// in the unit of its label.
pub(crate) fn prediction(task: &TaskSpec, scales: &LabelScales, output: f32) -> f32 {
    match (scales.get(&task.name), task.label) {
        (Some(scale), _) => scale.prediction(output),
        (None, TaskLabel::Action(_)) => 1.0 / (1.0 + (-output).exp()),
        (None, TaskLabel::Value(_)) => output,
    }
}

pub(crate) fn numbers<B: Backend>(tensor: Tensor<B, 2>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().into_vec().expect("converted to f32")
}
