//! Streaming training: one pass in time order, a sample a request,
//! predict-then-train, so every reported number is progressive.
//!
//! Dense weights learn with AdamW, sparse rows in the store with row-wise
//! Adagrad. The trainer does not read data sets or write logs: the host feeds
//! it batches and takes what each step predicted.

use std::path::Path;

use burn::{
    backend::Autodiff,
    grad_clipping::GradientClippingConfig,
    module::{AutodiffModule, Module},
    optim::{AdamW, AdamWConfig, GradientsAccumulator, Optimizer, adaptor::OptimizerAdaptor},
    tensor::backend::AutodiffBackend,
};
use hypercast_kernels::attention::HstuBackend;
use hypercast_store::{Adagrad, Store, StoreOptions};

use crate::{
    Error, Result,
    alignment::Alignments,
    batch::{Batcher, Statistics},
    checkpoint::{Manifest, save_weights, write_whole},
    cost::Size,
    device::{Cpu, DeviceKind},
    example::Example,
    model::FmModel,
    probe,
    shard::{self, Context, Network, Pass, Shard, merge_rows, valid_samples},
    spec::{FmConfig, FmSpec},
};

/// What a step predicted for its targets before it learned from them.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// `[rows * tae_dim]`.
    pub tae: Vec<f32>,
    /// `[rows * tasks]`: probabilities or values; NaN where the task is not valid on the row's surface.
    pub predictions: Vec<f32>,
    /// `[rows * tasks]`.
    pub labels: Vec<f32>,
    /// `[rows * tasks]`: the sample space.
    pub mask: Vec<bool>,
    /// The loss of eq. 3.
    pub loss: f32,
}

/// An FM in training, whatever its device.
pub trait FmTrainer: Send {
    /// Predicts `examples`, then learns from them. Without targets nothing happens.
    ///
    /// # Errors
    /// An example that does not fit, a store that fails, a loss that is not finite.
    fn step(&mut self, examples: &[&Example]) -> Result<StepOutput>;

    /// Predicts `examples` as a checkpoint of this moment would, and learns nothing: neither weights,
    /// nor rows of the store, nor statistics. The loss is 0.
    ///
    /// # Errors
    /// An example that does not fit.
    fn predict(&self, examples: &[&Example]) -> Result<StepOutput>;

    /// The user embeddings of `examples` at this moment, `[examples, FmConfig::user_state_width]`: the
    /// states of the last history token, of the token itself and after each layer. Zeros without a
    /// history. Targets are not read.
    ///
    /// # Errors
    /// An example that does not fit.
    fn user_states(&self, examples: &[&Example]) -> Result<Vec<f32>>;

    /// How many values the model has so far.
    fn size(&self) -> Size;

    /// Writes a checkpoint as `version` into `dir`, replacing what is there.
    ///
    /// # Errors
    /// What the file system or the store says.
    fn checkpoint(&mut self, dir: &Path, version: &str) -> Result<()>;
}

/// A fresh trainer whose store (with optimizer state) lives in `dir`.
///
/// # Errors
/// A configuration that cannot work, a device that is not in this build, a store that cannot be made.
pub fn create(
    dir: &Path,
    config: &FmConfig,
    spec: &FmSpec,
    device: DeviceKind,
) -> Result<Box<dyn FmTrainer>> {
    config.validate()?;
    spec.validate()?;
    device.check()?;
    match device {
        DeviceKind::Cpu => {
            let shards = std::thread::available_parallelism()
                .map_or(1, |cores| cores.get().min(MOST_SHARDS));
            Ok(Box::new(Trainer::<Autodiff<Cpu>>::create(dir, config, spec, shards)?))
        }
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => {
            Ok(Box::new(Trainer::<Autodiff<crate::device::Cuda>>::create(dir, config, spec, 1)?))
        }
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => unreachable!("check() refuses it"),
    }
}

struct Trainer<A: AutodiffBackend> {
    config: FmConfig,
    network: Network<A>,
    optimizer: OptimizerAdaptor<AdamW, Network<A>, A>,
    store: Store,
    batcher: Batcher,
    statistics: Statistics,
    steps: u64,
    requests: u64,
    trained_until_ms: i64,
    /// Threads that a batch is split over.
    shards: usize,
    device: A::Device,
}

/// Store rows touched since the last commit are kept in a journal; this bounds it.
const STEPS_A_COMMIT: u64 = 256;

/// Fewer requests than this are not worth a thread.
const LEAST_REQUESTS: usize = 4;

/// More threads than this gain little at the batch sizes of one machine.
const MOST_SHARDS: usize = 8;

impl<A> Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn create(dir: &Path, config: &FmConfig, spec: &FmSpec, shards: usize) -> Result<Self> {
        let device = A::Device::default();
        A::seed(&device, config.seed);
        let network = Network {
            model: FmModel::new(config, spec, &device),
            alignments: Alignments::new(config, spec, &device),
        };
        let options = StoreOptions {
            dim: config.embedding_dim,
            init_scale: config.sparse_init,
            seed: config.seed,
        };
        let clipping =
            (config.clip_norm > 0.0).then_some(GradientClippingConfig::Norm(config.clip_norm));
        Ok(Self {
            optimizer: AdamWConfig::new()
                .with_weight_decay(config.weight_decay)
                .with_grad_clipping(clipping)
                .init(),
            store: Store::create(dir.join("store"), &options)?,
            batcher: Batcher::new(spec, config),
            statistics: Statistics::new(spec),
            steps: 0,
            requests: 0,
            trained_until_ms: 0,
            config: config.clone(),
            network,
            shards,
            device,
        })
    }

    fn learning_rate(&self) -> f64 {
        let warmup = (self.steps + 1) as f64 / self.config.warmup_steps.max(1) as f64;
        self.config.learning_rate * warmup.min(1.0)
    }

    /// Every shard's pass, each on a thread of its own.
    fn passes(&self, shards: Vec<Shard>) -> Result<Vec<Pass>> {
        let valid = valid_samples(&shards, self.batcher.spec.tasks.len());
        let context = Context {
            config: &self.config,
            spec: &self.batcher.spec,
            valid: &valid,
            device: &self.device,
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = shards
                .into_iter()
                .map(|shard| {
                    // A fork has a graph of its own, so the backward passes do not wait for each other.
                    let Network { model, alignments } = &self.network;
                    let alignments = alignments.only(&shard.batch.surfaces);
                    let network = Network { model: model.clone(), alignments }.fork(&self.device);
                    scope.spawn(move || shard::pass::<A>(network, shard, context))
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Pass>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        })
    }

    /// Runs `look` over parts of `examples` on threads of their own, without a graph for gradients.
    fn probe<T: Send>(
        &self,
        examples: &[&Example],
        look: fn(Network<A::InnerBackend>, Shard, Context<'_, A::InnerBackend>) -> Result<T>,
    ) -> Result<Vec<T>> {
        let context = Context {
            config: &self.config,
            spec: &self.batcher.spec,
            valid: &[],
            device: &self.device,
        };
        let network = self.network.valid();
        let mut shards = Vec::with_capacity(self.shards);
        for part in examples.chunks(examples.len().div_ceil(self.shards).max(LEAST_REQUESTS)) {
            let batch = self.batcher.batch(part, &self.statistics)?;
            let mut rows = vec![0.0; batch.keys.len() * self.config.embedding_dim];
            self.store.gather(&batch.keys, &mut rows);
            shards.push(Shard { batch, rows });
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = shards
                .into_iter()
                .map(|shard| {
                    let network = network.clone();
                    scope.spawn(move || look(network, shard, context))
                })
                .collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<T>>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        })
    }

    fn learn(&mut self, passes: &mut [Pass]) -> Result<()> {
        let (keys, rows) = merge_rows(passes, self.config.embedding_dim);
        let adagrad = Adagrad { learning_rate: self.config.sparse_learning_rate, epsilon: 1e-8 };
        self.store.adagrad(&keys, &rows, &adagrad)?;
        let mut sum = GradientsAccumulator::new();
        for pass in passes {
            sum.accumulate(&self.network, std::mem::take(&mut pass.gradients));
        }
        self.network = self.optimizer.step(self.learning_rate(), self.network.clone(), sum.grads());
        self.steps += 1;
        if self.steps.is_multiple_of(STEPS_A_COMMIT) {
            self.store.commit()?;
        }
        Ok(())
    }
}

impl<A> FmTrainer for Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn step(&mut self, examples: &[&Example]) -> Result<StepOutput> {
        examples.iter().for_each(|example| self.statistics.observe(example));
        let mut shards = Vec::with_capacity(self.shards);
        for part in examples.chunks(examples.len().div_ceil(self.shards).max(LEAST_REQUESTS)) {
            let batch = self.batcher.batch(part, &self.statistics)?;
            if batch.targets() > 0 {
                let mut rows = vec![0.0; batch.keys.len() * self.config.embedding_dim];
                self.store.gather_or_init(&batch.keys, &mut rows)?;
                shards.push(Shard { batch, rows });
            }
        }
        let mut passes = self.passes(shards)?;
        let loss: f32 = passes.iter().map(|pass| pass.loss).sum();
        if !loss.is_finite() {
            return Err(Error::Training {
                step: self.steps,
                message: format!("the loss is {loss}; lower fm.learning_rate or set fm.clip_norm"),
            });
        }
        if !passes.is_empty() {
            self.learn(&mut passes)?;
        }
        self.requests += examples.len() as u64;
        self.trained_until_ms =
            examples.iter().map(|e| e.time_ms).fold(self.trained_until_ms, i64::max);
        let mut output =
            StepOutput { tae: vec![], predictions: vec![], labels: vec![], mask: vec![], loss };
        for pass in passes {
            output.tae.extend(pass.tae);
            output.predictions.extend(pass.predictions);
            output.labels.extend(pass.batch.labels);
            output.mask.extend(pass.batch.mask);
        }
        Ok(output)
    }

    fn predict(&self, examples: &[&Example]) -> Result<StepOutput> {
        let parts = self.probe(examples, probe::predict)?;
        let mut output = StepOutput::default();
        for part in parts {
            output.tae.extend(part.tae);
            output.predictions.extend(part.predictions);
            output.labels.extend(part.labels);
            output.mask.extend(part.mask);
        }
        Ok(output)
    }

    fn user_states(&self, examples: &[&Example]) -> Result<Vec<f32>> {
        let bare: Vec<Example> = examples.iter().map(|example| probe::bare(example)).collect();
        let bare: Vec<&Example> = bare.iter().collect();
        Ok(self.probe(&bare, probe::user_states)?.concat())
    }

    fn size(&self) -> Size {
        Size {
            serving: self.network.model.num_params(),
            dense: self.network.num_params(),
            sparse: self.store.len() * self.config.embedding_dim,
        }
    }

    fn checkpoint(&mut self, dir: &Path, version: &str) -> Result<()> {
        self.store.commit()?;
        let mut manifest =
            Manifest::new(version, &self.config, &self.batcher.spec, &self.statistics);
        manifest.requests = self.requests;
        manifest.trained_until_ms = self.trained_until_ms;
        let network = self.network.valid();
        write_whole(dir, |draft| {
            save_weights(&network.model, &draft.join("model.safetensors"))?;
            save_weights(&network.alignments, &draft.join("alignment.safetensors"))?;
            self.store.snapshot_into(draft.join("store"))?;
            manifest.write(draft)
        })
    }
}
