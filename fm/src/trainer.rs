//! Streaming training: one pass over the requests in time order. Each step predicts its examples
//! before it learns from them, so every reported metric is progressive.
//!
//! Dense weights learn with AdamW, the store's sparse rows with row-wise Adagrad. The trainer does
//! not read data sets or write logs: the caller feeds it batches and receives each step's
//! predictions.

use std::path::Path;

use burn::{
    backend::Autodiff,
    grad_clipping::GradientClippingConfig,
    module::{AutodiffModule, Module},
    optim::{AdamWConfig, GradientsAccumulator, Optimizer as _},
    tensor::backend::AutodiffBackend,
};
use hypercast_core::{atomic_dir, hash::mix_parts};
use hypercast_kernels::attention::HstuBackend;
use hypercast_store::{Adagrad, Store, StoreOptions};

use crate::{
    Result,
    batch::{BatchBuilder, FmBatch},
    checkpoint::{FmManifest, checkpoint_error, load_weights, replace_checkpoint, save_weights},
    cost::ModelSize,
    device::{Cpu, Cuda, DeviceKind, Wgpu},
    ema::{SavedAverage, WeightAverage},
    example::Example,
    growth::{SpecGrowth, growth_of},
    harm,
    label_scale::LabelScales,
    resume::{self, DenseOptimizer, TrainingState},
    row_keys::RowKeys,
    sampling::{ExampleSampler, ExampleSelection, split_by_memory},
    shard::{
        self, FmNetwork, GatheredBatch, PassContext, Shard, ShardResult, fresh_network, merge_rows,
        valid_samples,
    },
    spec::{FmConfig, FmSpec},
    update::{TrainedWeights, WeightTensor},
};

pub use crate::step_output::StepOutput;

/// An FM in training, on any device.
pub trait FmTrainer: Send {
    /// Predicts `examples`, then learns from them. Without targets nothing is learned. An example
    /// whose loss or gradients are not finite, or whose loss is a thousand times what is usual, is
    /// set aside, and so are all examples of a step that is not finite although none alone is so.
    ///
    /// # Errors
    /// An example that does not fit, a store that fails.
    fn step(&mut self, examples: &[&Example]) -> Result<StepOutput> {
        self.step_with_corrections(examples, &[])
    }

    /// Like [`FmTrainer::step`], and learns in the same step from late outcomes of earlier
    /// examples. The targets of `corrections` are those whose outcomes changed, and only what
    /// changed is marked as known. The output and the feature statistics do not include
    /// corrections.
    ///
    /// # Errors
    /// As [`FmTrainer::step`].
    fn step_with_corrections(
        &mut self,
        examples: &[&Example],
        corrections: &[&Example],
    ) -> Result<StepOutput>;

    /// Says whether an earlier pass has learned from the examples of the next steps. Predictions
    /// for them say nothing of how far those for new ones differ too much.
    fn set_repeats(&mut self, repeats: bool);

    /// Commits the store and returns the current weights that serving needs, as `version`.
    ///
    /// # Errors
    /// The store's errors.
    fn trained_weights(&mut self, version: &str) -> Result<TrainedWeights<'_>>;

    /// Predicts `examples` as a checkpoint written now would, without changing weights, rows of the
    /// store or statistics. The loss is 0.
    ///
    /// # Errors
    /// An example that does not fit.
    fn predict(&self, examples: &[&Example]) -> Result<StepOutput>;

    /// The current user embeddings of `examples`, `[examples, FmConfig::user_state_width]`: the
    /// states of the last history token before the first layer and after each layer. Zeros without
    /// a history. Targets are not read.
    ///
    /// # Errors
    /// An example that does not fit.
    fn user_states(&self, examples: &[&Example]) -> Result<Vec<f32>>;

    /// The number of values of the model now; sparse rows grow during training.
    fn size(&self) -> ModelSize;

    /// Writes a checkpoint with the name `version` into `dir`, replacing its content.
    ///
    /// # Errors
    /// Weights that are not finite: `dir` stays as it is. Errors of the file system or the store.
    fn checkpoint(&mut self, dir: &Path, version: &str) -> Result<()>;

    /// Saves everything that the next step depends on into `dir`, replacing its content, for
    /// [`resume`]. The store is copied, so time and disk space grow with it.
    ///
    /// # Errors
    /// Errors of the file system or the store; `dir` is then unchanged.
    fn save(&mut self, dir: &Path) -> Result<()>;
}

/// The folders of a resumed run.
#[derive(Debug, Clone, Copy)]
pub struct ResumePaths<'a> {
    /// A folder written by [`FmTrainer::save`]; it is only read.
    pub saved: &'a Path,
    /// The work folder, as `dir` of [`create`]; a store in it is replaced.
    pub work: &'a Path,
    /// How data has grown: a run of what it was before is taken over.
    pub growths: &'a [SpecGrowth],
}

/// Continues a saved run. On the same machine and device, all later results are bit for bit those
/// of a run that was never interrupted.
///
/// # Errors
/// A saved run that is missing, damaged or has another configuration or specification; the error
/// names the first key that differs.
pub fn resume(
    from: ResumePaths<'_>,
    config: &FmConfig,
    spec: &FmSpec,
    device: DeviceKind,
) -> Result<Box<dyn FmTrainer>> {
    open(from.work, Some(from), config, spec, device)
}

/// A new trainer whose store, with its optimizer state, is in `dir`.
///
/// # Errors
/// An invalid configuration, a device that [`DeviceKind::check`] refuses, or a store that cannot be
/// created.
pub fn create(
    dir: &Path,
    config: &FmConfig,
    spec: &FmSpec,
    device: DeviceKind,
) -> Result<Box<dyn FmTrainer>> {
    open(dir, None, config, spec, device)
}

/// A trainer at the beginning, or where the run in `saved` stopped.
fn open(
    work: &Path,
    from: Option<ResumePaths<'_>>,
    config: &FmConfig,
    spec: &FmSpec,
    device: DeviceKind,
) -> Result<Box<dyn FmTrainer>> {
    config.validate()?;
    spec.validate()?;
    config.validate_for(spec)?;
    device.check()?;
    let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let shards = if device == DeviceKind::Cpu { cores().min(MAX_SHARDS) } else { 1 };
    let fresh = TrainingState::new(config, spec, shards);
    match device {
        DeviceKind::Cpu => Ok(Box::new(Trainer::<Autodiff<Cpu>>::open(work, from, fresh)?)),
        DeviceKind::Cuda => Ok(Box::new(Trainer::<Autodiff<Cuda>>::open(work, from, fresh)?)),
        DeviceKind::Wgpu => Ok(Box::new(Trainer::<Autodiff<Wgpu>>::open(work, from, fresh)?)),
    }
}

struct Trainer<A: AutodiffBackend> {
    state: TrainingState,
    network: FmNetwork<A>,
    optimizer: DenseOptimizer<A>,
    /// The moving average of the weights, if the configuration has `average_decay`.
    average: Option<WeightAverage<A::InnerBackend>>,
    store: Store,
    batch_builder: BatchBuilder,
    sampler: ExampleSampler,
    repeats: bool,
}

/// A function of [`shard`] that evaluates a network on a part of some examples.
type PredictOnlyFn<B, T> = fn(&FmNetwork<B>, &GatheredBatch, PassContext<'_>) -> Result<T>;

/// The store journals the rows touched since its last commit; this bounds the journal.
const STEPS_PER_COMMIT: u64 = 256;

/// Fewer requests than this do not repay a thread.
const MIN_REQUESTS_PER_SHARD: usize = 4;

/// Approximate limit on the memory of one shard's activations.
const MAX_SHARD_BYTES: usize = 512 << 20;

/// More threads than this gain little at the batch sizes of one machine.
const MAX_SHARDS: usize = 8;

impl<A> Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn open(work: &Path, from: Option<ResumePaths<'_>>, fresh: TrainingState) -> Result<Self> {
        let TrainingState { config, spec, .. } = &fresh;
        let mut network = fresh_network(config, spec);
        let mut optimizer = optimizer(config);
        let decay = config.average_decay;
        let mut average = (decay > 0.0).then(|| WeightAverage::new(network.valid(), decay));
        let store = work.join("store");
        let (mut store, state) = match from {
            None => {
                let options = StoreOptions {
                    dim: config.embedding_dim,
                    init_scale: config.sparse_init,
                    seed: config.seed,
                };
                let config = config.of_new_model();
                (Store::create(store, &options)?, TrainingState { config, ..fresh.clone() })
            }
            Some(ResumePaths { saved, growths, .. }) => {
                let mut state = TrainingState::read(saved)?;
                let growth = growth_of(growths, &state.spec);
                if let Some(growth) = &growth {
                    growth.training(&mut state);
                }
                state.config = state.check(saved, config, spec)?;
                atomic_dir::remove(&store)?;
                Store::open(saved.join("store"))?.copy_into(&store)?;
                let dim = config.embedding_dim;
                let (own, growth) = (saved.join(resume::NETWORK_FILE), growth.as_ref());
                network = load_weights(network, &own, growth, dim)?;
                let (dir, step) = (saved, state.steps);
                let from = SavedAverage { dir, growth, embedding_dim: dim, step };
                average = average.map(|average| average.load(from)).transpose()?;
                optimizer = state.load_moments(saved, &network, optimizer, growth)?;
                (Store::open(&store)?, state)
            }
        };
        store.admit_after(config.admit_after);
        Ok(Self {
            network,
            optimizer,
            average,
            store,
            batch_builder: BatchBuilder {
                field_numbers: state.field_numbers.clone(),
                ..BatchBuilder::new(spec, &state.config, RowKeys::of_format(state.format))
            },
            sampler: ExampleSampler::new(&state.config, spec),
            repeats: false,
            state,
        })
    }

    /// The shard of some examples that fit: whole for predicting, and sampled for learning where
    /// sampling leaves something out.
    fn shard(&mut self, examples: &[&Example]) -> Result<Option<Shard>> {
        let window = self.state.config.history_window();
        let all: Vec<_> =
            examples.iter().map(|example| ExampleSelection::whole(example, window)).collect();
        let batch = self.batch_builder.lay_out(&all, &self.state.statistics);
        if batch.targets() == 0 {
            return Ok(None);
        }
        let samples: Vec<_> =
            examples.iter().map(|example| self.sampler.sample(example, self.state.steps)).collect();
        let whole = self.part(batch)?;
        let sample = if samples.iter().any(Option::is_some) {
            let parts: Vec<_> = samples
                .into_iter()
                .zip(all)
                .map(|(sample, whole)| sample.unwrap_or(whole))
                // Without a target there is no loss, and encoding the history would be wasted.
                .filter(|selected| !selected.targets.is_empty())
                .collect();
            let batch = self.batch_builder.lay_out(&parts, &self.state.statistics);
            Some(self.part(batch)?)
        } else {
            None
        };
        Ok(Some(Shard { whole, sample }))
    }

    fn part(&mut self, batch: FmBatch) -> Result<GatheredBatch> {
        let mut rows = vec![0.0; batch.keys.len() * self.state.config.embedding_dim];
        self.store.gather_or_init(&batch.keys, &mut rows)?;
        Ok(GatheredBatch { batch, rows })
    }

    /// Predicts and differentiates examples that fit, after their features joined the statistics.
    /// The first `observed` are no corrections. Predictions are made on the scales of before.
    fn attempt(&mut self, examples: &[&Example], observed: usize) -> Result<Vec<ShardResult>> {
        let before = self.state.statistics.labels.clone();
        for example in &examples[..observed] {
            self.state.statistics.observe(example, &self.state.spec);
            self.state.statistics.observe_labels(example, &self.state.spec.tasks);
        }
        let mut shards = Vec::with_capacity(self.state.shards);
        let requests = examples.len().div_ceil(self.state.shards).max(MIN_REQUESTS_PER_SHARD);
        let TrainingState { config, spec, .. } = &self.state;
        for part in split_by_memory(examples, config, spec, requests, MAX_SHARD_BYTES) {
            shards.extend(self.shard(part)?);
        }
        self.passes(shards, &before)
    }

    /// Whether learning from these passes would harm the model.
    fn is_harmful(&self, passes: &[ShardResult]) -> bool {
        let TrainingState { steps, mean_loss, .. } = self.state;
        !harm::is_finite(&self.network, passes)
            || harm::is_unusual(harm::loss(passes).into(), mean_loss, steps)
    }

    /// The examples that would harm the model each alone, by index. It changes no statistics.
    fn harmful_examples(&mut self, examples: &[&Example], observed: usize) -> Result<Vec<usize>> {
        let statistics = self.state.statistics.clone();
        let mut harmful = Vec::new();
        for (at, example) in examples.iter().enumerate() {
            let passes = self.attempt(&[example], usize::from(at < observed))?;
            self.state.statistics = statistics.clone();
            if self.is_harmful(&passes) {
                harmful.push(at);
            }
        }
        Ok(harmful)
    }

    fn learning_rate(&self) -> f64 {
        let warmup = (self.state.steps + 1) as f64 / self.state.config.warmup_steps.max(1) as f64;
        self.state.config.learning_rate * warmup.min(1.0)
    }

    /// Predicts and differentiates all shards, on several threads.
    fn passes(&self, mut shards: Vec<Shard>, scales: &LabelScales) -> Result<Vec<ShardResult>> {
        for (at, shard) in shards.iter_mut().enumerate() {
            let Shard { whole, sample } = shard;
            let learned = sample.as_mut().unwrap_or(whole);
            learned.batch.dropout_seed =
                mix_parts(&[self.state.config.seed, self.state.steps, at as u64]);
        }
        let valid = valid_samples(&shards, self.state.spec.tasks.len());
        let TrainingState { config, spec, .. } = &self.state;
        let shares = self.state.gradient_shares();
        let context = PassContext { config, spec, scales, valid: &valid, shares: &shares };
        // A fork has its own autodiff graph, so the backward passes do not wait for each other.
        let prepare = |shard: Shard| {
            let FmNetwork { model, alignments } = &self.network;
            let learned = &shard.sample.as_ref().unwrap_or(&shard.whole).batch;
            let alignments = alignments.only(&learned.surfaces);
            let learning = FmNetwork { model: model.clone(), alignments };
            (learning.fork(&A::Device::default()), self.predicting(), shard)
        };
        shard::run_in_waves(shards, self.state.shards, prepare, |(learning, predicting, shard)| {
            shard::pass::<A>(&learning, &predicting, shard, context)
        })
    }

    /// Runs `evaluate` over parts of `examples`, without an autodiff graph.
    fn predict_only<T: Send>(
        &self,
        examples: &[&Example],
        evaluate: PredictOnlyFn<A::InnerBackend, T>,
    ) -> Result<Vec<T>> {
        let TrainingState { config, spec, statistics, .. } = &self.state;
        let scales = &statistics.labels;
        let context = PassContext { config, spec, scales, valid: &[], shares: &[] };
        let network = self.predicting();
        let mut all = Vec::with_capacity(self.state.shards);
        let requests = examples.len().div_ceil(self.state.shards).max(MIN_REQUESTS_PER_SHARD);
        for part in split_by_memory(examples, config, spec, requests, MAX_SHARD_BYTES) {
            let batch = self.batch_builder.build(part, &self.state.statistics)?;
            let mut rows = vec![0.0; batch.keys.len() * self.state.config.embedding_dim];
            self.store.gather(&batch.keys, &mut rows)?;
            all.push(GatheredBatch { batch, rows });
        }
        let prepare = |part| (network.clone(), part);
        shard::run_in_waves(all, self.state.shards, prepare, |(network, part)| {
            evaluate(&network, &part, context)
        })
    }

    /// That of a model that serves, which knows of no surface's own alignment module.
    fn manifest(&self, version: &str) -> FmManifest {
        let state = self.state.clone();
        let spec = state.spec.served();
        FmManifest {
            format: state.format,
            version: version.into(),
            config: state.config,
            statistics: state.statistics.served(&spec),
            spec,
            requests: state.requests,
            trained_until_ms: state.trained_until_ms,
            field_numbers: state.field_numbers,
        }
    }

    /// The weights that make predictions and TAEs: the moving average, if there is one.
    fn predicting(&self) -> FmNetwork<A::InnerBackend> {
        let average = self.average.as_ref().map(|average| average.network.clone());
        average.unwrap_or_else(|| self.network.valid())
    }

    /// Removes rows that have not been trained for `expire_after_steps`. It runs at fixed steps, so
    /// that a resumed run expires the same rows.
    fn expire(&mut self) {
        let after = u64::from(self.state.config.expire_after_steps);
        if after > 0 && self.state.steps.is_multiple_of((after / 4).max(1)) {
            self.store.expire(clock(self.state.steps.saturating_sub(after)));
        }
    }

    fn learn(&mut self, passes: &mut [ShardResult]) -> Result<()> {
        let (keys, rows) = merge_rows(passes, self.state.config.embedding_dim);
        let adagrad =
            Adagrad { learning_rate: self.state.config.sparse_learning_rate, epsilon: 1e-8 };
        self.store.adagrad(&keys, &rows, &adagrad)?;
        let mut sum = GradientsAccumulator::new();
        for pass in passes {
            sum.accumulate(&self.network, std::mem::take(&mut pass.gradients.dense));
        }
        self.network = self.optimizer.step(self.learning_rate(), self.network.clone(), sum.grads());
        if let Some(average) = self.average.take() {
            self.average = Some(average.update(&self.network.valid(), self.state.steps));
        }
        self.state.steps += 1;
        self.expire();
        if self.state.steps.is_multiple_of(STEPS_PER_COMMIT) {
            self.store.commit()?;
        }
        Ok(())
    }
}

/// The time stamp of the store's rows: the training step.
fn clock(steps: u64) -> u32 {
    u32::try_from(steps).unwrap_or(u32::MAX)
}

impl<A> FmTrainer for Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn step_with_corrections(
        &mut self,
        examples: &[&Example],
        corrections: &[&Example],
    ) -> Result<StepOutput> {
        let all: Vec<&Example> = examples.iter().chain(corrections).copied().collect();
        // Before anything is learned of them, be it the means of their columns.
        all.iter().try_for_each(|example| self.batch_builder.check(example))?;
        self.store.set_clock(clock(self.state.steps));
        let before = self.state.statistics.clone();
        let mut passes = self.attempt(&all, examples.len())?;
        let mut set_aside = Vec::new();
        if self.is_harmful(&passes) {
            self.state.statistics = before.clone();
            set_aside = self.harmful_examples(&all, examples.len())?;
            let is_kept = |at: &usize| set_aside.binary_search(at).is_err();
            let kept: Vec<&Example> = (0..all.len()).filter(is_kept).map(|at| all[at]).collect();
            let observed = (0..examples.len()).filter(is_kept).count();
            passes = self.attempt(&kept, observed)?;
            if !harm::is_finite(&self.network, &passes) {
                tracing::warn!(
                    step = self.state.steps,
                    "the loss of a step is not finite, and no example alone makes it so: all are \
                     set aside; lower fm.learning_rate or set fm.clip_norm"
                );
                self.state.statistics = before;
                set_aside = (0..all.len()).collect();
                passes.clear();
            }
        }
        let loss = harm::loss(&passes);
        if !passes.is_empty() {
            self.state.mean_loss = harm::moved_mean(self.state.mean_loss, loss.into());
            self.learn(&mut passes)?;
        }
        self.state.requests += examples.len() as u64;
        self.state.trained_until_ms =
            examples.iter().map(|e| e.time_ms).fold(self.state.trained_until_ms, i64::max);
        let mut output = StepOutput { loss, set_aside, ..StepOutput::default() };
        for pass in passes {
            output.append(pass.output);
        }
        let widths = [self.state.config.tae_width(), self.state.spec.tasks.len()];
        output.fill_gaps(&all, widths);
        // The rows of corrections come last.
        let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
        let cells = rows * self.state.spec.tasks.len();
        output.tae.truncate(rows * self.state.config.tae_width());
        output.predictions.truncate(cells);
        output.labels.truncate(cells);
        output.mask.truncate(cells);
        self.state.statistics.correct(&output, &self.state.spec.tasks, !self.repeats);
        self.state.count_added(examples, &output);
        Ok(output)
    }

    fn set_repeats(&mut self, repeats: bool) {
        self.repeats = repeats;
    }

    fn trained_weights(&mut self, version: &str) -> Result<TrainedWeights<'_>> {
        self.store.commit()?;
        Ok(TrainedWeights {
            manifest: self.manifest(version),
            dense: WeightTensor::of(&self.predicting().model),
            rows: Some(&self.store),
        })
    }

    fn predict(&self, examples: &[&Example]) -> Result<StepOutput> {
        let mut output = StepOutput::default();
        for part in self.predict_only(examples, shard::predict)? {
            output.append(part);
        }
        Ok(output)
    }

    fn user_states(&self, examples: &[&Example]) -> Result<Vec<f32>> {
        let history = |example: &&Example| Example { targets: Vec::new(), ..(*example).clone() };
        let histories: Vec<Example> = examples.iter().map(history).collect();
        let histories: Vec<&Example> = histories.iter().collect();
        Ok(self.predict_only(&histories, shard::user_states)?.concat())
    }

    fn size(&self) -> ModelSize {
        ModelSize {
            serving: self.network.model.num_params(),
            dense: self.network.num_params(),
            sparse: self.store.len() * self.state.config.embedding_dim,
        }
    }

    fn checkpoint(&mut self, dir: &Path, version: &str) -> Result<()> {
        let trained = self.trained_weights(version)?;
        if let Some(what) = trained.not_finite()? {
            let why = "is not finite after training, so nothing was written; lower the learning \
                       rates (fm.learning_rate, fm.sparse_learning_rate) and train again";
            return Err(checkpoint_error(dir, format!("{what} {why}")));
        }
        let manifest = trained.manifest;
        let network = self.predicting();
        replace_checkpoint(dir, |draft| {
            save_weights(&network.model, &draft.join("model.safetensors"))?;
            save_weights(&network.alignments, &draft.join("alignment.safetensors"))?;
            self.store.snapshot_into(draft.join("store"), self.state.config.serving_rows)?;
            manifest.write(draft)
        })
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        let record = self.optimizer.to_record();
        atomic_dir::replace(dir, |draft| {
            self.store.copy_into(draft.join("store"))?;
            save_weights(&self.network, &draft.join(resume::NETWORK_FILE))?;
            if let Some(average) = &self.average {
                average.save(draft)?;
            }
            self.state.clone().write(draft, &self.network, record)
        })
    }
}

fn optimizer<A: AutodiffBackend>(config: &FmConfig) -> DenseOptimizer<A> {
    let clipping =
        (config.clip_norm > 0.0).then_some(GradientClippingConfig::Norm(config.clip_norm));
    AdamWConfig::new().with_weight_decay(config.weight_decay).with_grad_clipping(clipping).init()
}
