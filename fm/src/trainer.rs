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
    module::{AutodiffModule, Module, ModuleVisitor, Param},
    optim::{AdamWConfig, GradientsAccumulator, Optimizer as _},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use hypercast_kernels::attention::HstuBackend;
use hypercast_store::{Adagrad, Store, StoreOptions};

use crate::{
    Error, Result,
    alignment::Alignments,
    average,
    batch::{Batch, Batcher, Statistics},
    chance::mix,
    checkpoint::{Manifest, failed, load_weights, save_weights, write_whole},
    cost::Size,
    device::{Cpu, DeviceKind},
    example::Example,
    model::{FmModel, drawing},
    probe,
    resume::{self, Optimizer, State},
    sampling::{Sampler, Selected, parts},
    shard::{self, Context, Network, Part, Pass, Shard, Weights, merge_rows, valid_samples},
    spec::{FmConfig, FmSpec},
    update::{Dense, Trained},
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
    fn step(&mut self, examples: &[&Example]) -> Result<StepOutput> {
        self.step_with(examples, &[])
    }

    /// The same, and in the same step it learns what changed of earlier examples: the targets of `corrections` are
    /// those whose outcomes came late, and only what changed is known of them. Corrections are not in the output, and
    /// statistics have seen their columns before.
    ///
    /// # Errors
    /// As [`FmTrainer::step`].
    fn step_with(&mut self, examples: &[&Example], corrections: &[&Example]) -> Result<StepOutput>;

    /// What serving needs of it, as of this moment, which it commits; of the name `version`.
    ///
    /// # Errors
    /// What the store says.
    fn trained(&mut self, version: &str) -> Result<Trained<'_>>;

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

    /// Saves everything that the next step depends on into `dir`, replacing what is there, for
    /// [`resume`]. The store is copied, so it takes as long and as much room as the store is big.
    ///
    /// # Errors
    /// What the file system or the store says; `dir` is then as it was.
    fn save(&mut self, dir: &Path) -> Result<()>;
}

/// What [`resume`] reads and where it goes on.
#[derive(Debug, Clone, Copy)]
pub struct Resume<'a> {
    /// What [`FmTrainer::save`] wrote; it stays as it is.
    pub saved: &'a Path,
    /// The work folder, as for [`create`]; a store in it is replaced.
    pub work: &'a Path,
}

/// Goes on with a saved run: on the same machine and device, every later number is that of a run
/// that was never interrupted, bit for bit.
///
/// # Errors
/// A saved run that is missing, damaged or of another configuration or specification; the first key
/// that differs is named.
pub fn resume(
    from: Resume<'_>,
    config: &FmConfig,
    spec: &FmSpec,
    device: DeviceKind,
) -> Result<Box<dyn FmTrainer>> {
    check(config, spec, device)?;
    match device {
        DeviceKind::Cpu => Ok(Box::new(Trainer::<Autodiff<Cpu>>::resume(from, config, spec)?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => {
            Ok(Box::new(Trainer::<Autodiff<crate::device::Cuda>>::resume(from, config, spec)?))
        }
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => unreachable!("check() refuses it"),
    }
}

fn check(config: &FmConfig, spec: &FmSpec, device: DeviceKind) -> Result<()> {
    config.validate()?;
    spec.validate()?;
    config.validate_for(spec)?;
    device.check()
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
    check(config, spec, device)?;
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
    optimizer: Optimizer<A>,
    /// Of the weights, where the configuration has `average_decay`.
    average: Option<Network<A::InnerBackend>>,
    store: Store,
    batcher: Batcher,
    sampler: Sampler,
    statistics: Statistics,
    steps: u64,
    requests: u64,
    trained_until_ms: i64,
    /// Threads that a batch is split over.
    shards: usize,
    device: A::Device,
}

/// Looks at a part of some examples with a network.
type Look<B, T> = fn(Network<B>, Part, Context<'_, B>) -> Result<T>;

/// Store rows touched since the last commit are kept in a journal; this bounds it.
const STEPS_A_COMMIT: u64 = 256;

/// Fewer requests than this are not worth a thread.
const LEAST_REQUESTS: usize = 4;

/// What the activations of one shard's pass may take in memory, about.
const LEARNING_BYTES: usize = 512 << 20;

/// More threads than this gain little at the batch sizes of one machine.
const MOST_SHARDS: usize = 8;

impl<A> Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn create(dir: &Path, config: &FmConfig, spec: &FmSpec, shards: usize) -> Result<Self> {
        let options = StoreOptions {
            dim: config.embedding_dim,
            init_scale: config.sparse_init,
            seed: config.seed,
        };
        let device = A::Device::default();
        let network = fresh_network(config, spec, &device);
        let mut store = Store::create(dir.join("store"), &options)?;
        store.admit_after(config.admit_after);
        Ok(Self {
            average: (config.average_decay > 0.0).then(|| network.valid()),
            network,
            optimizer: optimizer(config),
            store,
            batcher: Batcher::new(spec, config),
            sampler: Sampler::new(config, spec),
            statistics: Statistics::new(spec),
            steps: 0,
            requests: 0,
            trained_until_ms: 0,
            config: config.clone(),
            shards,
            device,
        })
    }

    fn resume(from: Resume<'_>, config: &FmConfig, spec: &FmSpec) -> Result<Self> {
        let state = State::read(from.saved)?;
        state.check(from.saved, config, spec)?;
        let device = A::Device::default();
        let store = from.work.join("store");
        if store.exists() {
            std::fs::remove_dir_all(&store).map_err(|error| failed(&store, error))?;
        }
        Store::open(from.saved.join("store"))?.copy_into(&store)?;
        let mut store = Store::open(&store)?;
        store.admit_after(config.admit_after);
        let fresh = fresh_network(config, spec, &device);
        let network = load_weights(fresh, &from.saved.join(resume::NETWORK), &device)?;
        let average = match config.average_decay > 0.0 {
            true => {
                Some(load_weights(network.valid(), &from.saved.join(resume::AVERAGE), &device)?)
            }
            false => None,
        };
        Ok(Self {
            average,
            optimizer: state.load_moments(from.saved, &network, optimizer(config))?,
            store,
            batcher: Batcher::new(spec, config),
            sampler: Sampler::new(config, spec),
            steps: state.steps,
            requests: state.requests,
            trained_until_ms: state.trained_until_ms,
            shards: state.shards,
            statistics: state.statistics,
            config: config.clone(),
            network,
            device,
        })
    }

    /// The whole of some examples, and what is learned from them where that is less.
    fn shard(&mut self, examples: &[&Example]) -> Result<Option<Shard>> {
        let batch = self.batcher.batch(examples, &self.statistics)?;
        if batch.targets() == 0 {
            return Ok(None);
        }
        let samples: Vec<_> =
            examples.iter().map(|example| self.sampler.sample(example, self.steps)).collect();
        let whole = self.part(batch)?;
        let sample = match samples.iter().any(Option::is_some) {
            true => {
                let whole = |example| Selected::whole(example, self.config.history_window());
                let parts: Vec<_> = samples
                    .into_iter()
                    .zip(examples)
                    .map(|(sample, example)| sample.unwrap_or_else(|| whole(example)))
                    // Without a target there is nothing to learn, and the history would be idle.
                    .filter(|selected| !selected.targets.is_empty())
                    .collect();
                let batch = self.batcher.batch_selected(&parts, &self.statistics)?;
                Some(self.part(batch)?)
            }
            false => None,
        };
        Ok(Some(Shard { whole, sample }))
    }

    fn part(&mut self, batch: Batch) -> Result<Part> {
        let mut rows = vec![0.0; batch.keys.len() * self.config.embedding_dim];
        self.store.gather_or_init(&batch.keys, &mut rows)?;
        Ok(Part { batch, rows })
    }

    fn learning_rate(&self) -> f64 {
        let warmup = (self.steps + 1) as f64 / self.config.warmup_steps.max(1) as f64;
        self.config.learning_rate * warmup.min(1.0)
    }

    /// Every shard's pass.
    fn passes(&self, mut shards: Vec<Shard>) -> Result<Vec<Pass>> {
        for (at, shard) in shards.iter_mut().enumerate() {
            let Shard { whole, sample } = shard;
            let learned = sample.as_mut().unwrap_or(whole);
            learned.batch.noise = mix(&[self.config.seed, self.steps, at as u64]);
        }
        let valid = valid_samples(&shards, self.batcher.spec.tasks.len());
        let context = Context {
            config: &self.config,
            spec: &self.batcher.spec,
            valid: &valid,
            device: &self.device,
        };
        // A fork has a graph of its own, so the backward passes do not wait for each other.
        let prepare = |shard: Shard| {
            let Network { model, alignments } = &self.network;
            let alignments = alignments.only(shard.learned_surfaces());
            let weights = Weights {
                learning: Network { model: model.clone(), alignments }.fork(&self.device),
                predicting: self.predicting(),
            };
            (weights, shard)
        };
        in_waves(shards, self.shards, prepare, |(weights, shard)| {
            shard::pass::<A>(weights, shard, context)
        })
    }

    /// Runs `look` over parts of `examples`, without a graph for gradients.
    fn probe<T: Send>(
        &self,
        examples: &[&Example],
        look: Look<A::InnerBackend, T>,
    ) -> Result<Vec<T>> {
        let context = Context {
            config: &self.config,
            spec: &self.batcher.spec,
            valid: &[],
            device: &self.device,
        };
        let network = self.predicting();
        let mut all = Vec::with_capacity(self.shards);
        let requests = examples.len().div_ceil(self.shards).max(LEAST_REQUESTS);
        for part in parts(examples, &self.config, requests, LEARNING_BYTES) {
            let batch = self.batcher.batch(part, &self.statistics)?;
            let mut rows = vec![0.0; batch.keys.len() * self.config.embedding_dim];
            self.store.gather(&batch.keys, &mut rows);
            all.push(Part { batch, rows });
        }
        let prepare = |part| (network.clone(), part);
        in_waves(all, self.shards, prepare, |(network, part)| look(network, part, context))
    }

    fn manifest(&self, version: &str) -> Manifest {
        let (requests, trained_until_ms) = (self.requests, self.trained_until_ms);
        let manifest = Manifest::new(version, &self.config, &self.batcher.spec, &self.statistics);
        Manifest { requests, trained_until_ms, ..manifest }
    }

    /// The weights that predict, serve and make TAEs.
    fn predicting(&self) -> Network<A::InnerBackend> {
        self.average.clone().unwrap_or_else(|| self.network.valid())
    }

    /// Removes rows that have not learned for long. When depends on the steps alone, so a resumed training does the same.
    fn expire(&mut self) {
        let after = u64::from(self.config.expire_after_steps);
        if after > 0 && self.steps.is_multiple_of((after / 4).max(1)) {
            self.store.expire(clock(self.steps.saturating_sub(after)));
        }
    }

    fn learn(&mut self, passes: &mut [Pass]) -> Result<()> {
        let (keys, rows) = merge_rows(passes, self.config.embedding_dim);
        let adagrad = Adagrad { learning_rate: self.config.sparse_learning_rate, epsilon: 1e-8 };
        self.store.adagrad(&keys, &rows, &adagrad)?;
        let mut sum = GradientsAccumulator::new();
        for pass in passes {
            sum.accumulate(&self.network, std::mem::take(&mut pass.lesson.gradients));
        }
        self.network = self.optimizer.step(self.learning_rate(), self.network.clone(), sum.grads());
        if let Some(average) = self.average.take() {
            let (now, decay) = (self.network.valid(), self.config.average_decay);
            self.average = Some(average::follow(average, &now, decay, self.steps));
        }
        self.steps += 1;
        self.expire();
        if self.steps.is_multiple_of(STEPS_A_COMMIT) {
            self.store.commit()?;
        }
        Ok(())
    }
}

/// The clock that rows of the store are stamped with.
fn clock(steps: u64) -> u32 {
    u32::try_from(steps).unwrap_or(u32::MAX)
}

impl<A> FmTrainer for Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn step_with(&mut self, examples: &[&Example], corrections: &[&Example]) -> Result<StepOutput> {
        examples.iter().for_each(|example| self.statistics.observe(example));
        self.store.set_clock(clock(self.steps));
        let mut shards = Vec::with_capacity(self.shards);
        let all: Vec<&Example> = examples.iter().chain(corrections).copied().collect();
        let requests = all.len().div_ceil(self.shards).max(LEAST_REQUESTS);
        for part in parts(&all, &self.config, requests, LEARNING_BYTES) {
            shards.extend(self.shard(part)?);
        }
        let mut passes = self.passes(shards)?;
        let loss: f32 = passes.iter().map(|pass| pass.lesson.loss).sum();
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
        // Corrections are the last of the rows.
        let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
        let cells = rows * self.batcher.spec.tasks.len();
        output.tae.truncate(rows * self.config.tae_width());
        output.predictions.truncate(cells);
        output.labels.truncate(cells);
        output.mask.truncate(cells);
        Ok(output)
    }

    fn trained(&mut self, version: &str) -> Result<Trained<'_>> {
        self.store.commit()?;
        Ok(Trained {
            manifest: self.manifest(version),
            dense: Dense::of(&self.predicting().model),
            rows: &self.store,
        })
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
        let manifest = self.manifest(version);
        let network = self.predicting();
        write_whole(dir, |draft| {
            save_weights(&network.model, &draft.join("model.safetensors"))?;
            save_weights(&network.alignments, &draft.join("alignment.safetensors"))?;
            self.store.snapshot_into(draft.join("store"), self.config.serving_rows)?;
            manifest.write(draft)
        })
    }

    fn save(&mut self, dir: &Path) -> Result<()> {
        let mut state = State::new(&self.config, &self.batcher.spec);
        state.statistics = self.statistics.clone();
        state.shards = self.shards;
        (state.steps, state.requests) = (self.steps, self.requests);
        state.trained_until_ms = self.trained_until_ms;
        let record = self.optimizer.to_record();
        write_whole(dir, |draft| {
            self.store.copy_into(draft.join("store"))?;
            save_weights(&self.network, &draft.join(resume::NETWORK))?;
            if let Some(average) = &self.average {
                save_weights(average, &draft.join(resume::AVERAGE))?;
            }
            state.write(draft, &self.network, record)
        })
    }
}

/// Runs `run` over what `prepare` makes of each of `all`, on `threads` threads at a time: long
/// histories make more parts of a batch than there are threads. The results come in order.
fn in_waves<S, P: Send, T: Send>(
    all: Vec<S>,
    threads: usize,
    prepare: impl Fn(S) -> P,
    run: impl Fn(P) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(all.len());
    let mut rest = all.into_iter();
    while rest.len() > 0 {
        std::thread::scope(|scope| -> Result<()> {
            let prepared: Vec<P> = rest.by_ref().take(threads).map(&prepare).collect();
            let run = &run;
            let wave: Vec<_> =
                prepared.into_iter().map(|one| scope.spawn(move || run(one))).collect();
            for thread in wave {
                let result = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                results.push(result?);
            }
            Ok(())
        })?;
    }
    Ok(results)
}

/// New weights from the configuration's seed, drawn at once and not when used: the lock keeps others from drawing meanwhile.
fn fresh_network<A: AutodiffBackend + HstuBackend>(
    config: &FmConfig,
    spec: &FmSpec,
    device: &A::Device,
) -> Network<A> {
    let _alone = drawing();
    A::seed(device, config.seed);
    let network = Network {
        model: FmModel::new(config, spec, device),
        alignments: Alignments::new(config, spec, device),
    };
    network.visit(&mut Draw);
    network
}

/// Draws weights that are still to be drawn.
struct Draw;

impl<B: Backend> ModuleVisitor<B> for Draw {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        param.val();
    }
}

fn optimizer<A: AutodiffBackend>(config: &FmConfig) -> Optimizer<A> {
    let clipping =
        (config.clip_norm > 0.0).then_some(GradientClippingConfig::Norm(config.clip_norm));
    AdamWConfig::new().with_weight_decay(config.weight_decay).with_grad_clipping(clipping).init()
}
