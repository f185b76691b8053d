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
    optim::{AdamW, AdamWConfig, GradientsParams, Optimizer, adaptor::OptimizerAdaptor},
    tensor::{
        Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};
use hypercast_kernels::attention::HstuBackend;
use hypercast_store::{Adagrad, Store, StoreOptions};

use crate::{
    Error, Result,
    alignment::{Aligned, Alignments},
    batch::{Batch, Batcher, Statistics},
    checkpoint::{Manifest, save_weights, write_whole},
    device::{Cpu, DeviceKind},
    example::Example,
    inference::{embeddings, output},
    loss::{Targets, mtml},
    model::{self, FmModel, Forward},
    spec::{FmConfig, FmSpec, Label},
};

/// What a step predicted for its targets before it learned from them.
#[derive(Debug, Clone)]
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
        DeviceKind::Cpu => Ok(Box::new(Trainer::<Autodiff<Cpu>>::create(dir, config, spec)?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => {
            Ok(Box::new(Trainer::<Autodiff<crate::device::Cuda>>::create(dir, config, spec)?))
        }
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => unreachable!("check() refuses it"),
    }
}

/// Everything that gradients reach: the model and what only training needs.
#[derive(Module, Debug)]
struct Network<B: Backend> {
    model: FmModel<B>,
    alignments: Alignments<B>,
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
    device: A::Device,
}

/// Store rows touched since the last commit are kept in a journal; this bounds it.
const STEPS_A_COMMIT: u64 = 256;

impl<A> Trainer<A>
where
    A: AutodiffBackend + HstuBackend,
    A::InnerBackend: HstuBackend,
{
    fn create(dir: &Path, config: &FmConfig, spec: &FmSpec) -> Result<Self> {
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
            store: Store::create(&dir.join("store"), &options)?,
            batcher: Batcher::new(spec, config),
            statistics: Statistics::new(spec),
            steps: 0,
            requests: 0,
            trained_until_ms: 0,
            config: config.clone(),
            network,
            device,
        })
    }

    fn forward(&self, leaf: Tensor<A, 2>, batch: &Batch) -> Result<(Forward<A>, Vec<Aligned<A>>)> {
        let attention = model::attention(&self.config, batch)?;
        let forward = self.network.model.forward(leaf, batch, &attention);
        let width = self.batcher.spec.features;
        let features = TensorData::new(batch.features.clone(), [batch.targets(), width]);
        let aligned = match self.batcher.spec.auxiliary_tasks() {
            [] => Vec::new(),
            _ => {
                let features = Tensor::from_data(features, &self.device);
                self.network.alignments.forward(&forward.tae, &features, &batch.surfaces)
            }
        };
        Ok((forward, aligned))
    }

    fn loss(&self, batch: &Batch, main: Tensor<A, 2>, aligned: &[Aligned<A>]) -> Tensor<A, 1> {
        let spec = &self.batcher.spec;
        let (tasks, mains) = (spec.tasks.len(), spec.main_tasks().len());
        let columns = |from: usize, to: usize| {
            let pick = |index: &usize| (from..to).contains(&(index % tasks));
            let labels =
                (0..batch.labels.len()).filter(pick).map(|index| batch.labels[index]).collect();
            let mask: Vec<bool> =
                (0..batch.mask.len()).filter(pick).map(|index| batch.mask[index]).collect();
            Targets::new(&spec.tasks[from..to], labels, &mask)
        };
        let mut loss = mtml(main, &columns(0, mains));
        if mains < tasks {
            let targets = columns(mains, tasks);
            for aligned in aligned {
                loss = loss + mtml(aligned.outputs.clone(), &targets.rows(&aligned.rows));
            }
        }
        loss
    }

    fn predictions(&self, batch: &Batch, main: &[f32], aligned: &[Aligned<A>]) -> Vec<f32> {
        let spec = &self.batcher.spec;
        let (tasks, mains) = (spec.tasks.len(), spec.main_tasks().len());
        let mut all = vec![f32::NAN; batch.targets() * tasks];
        for (row, values) in main.chunks_exact(mains).enumerate() {
            all[row * tasks..row * tasks + mains].copy_from_slice(values);
        }
        for aligned in aligned {
            let data = aligned.outputs.clone().into_data().convert::<f32>();
            for (at, value) in data.iter::<f32>().enumerate() {
                let (row, task) =
                    (aligned.rows[at / (tasks - mains)], mains + at % (tasks - mains));
                if spec.tasks[task].surfaces[batch.surfaces[row] as usize] {
                    let binary = matches!(spec.tasks[task].label, Label::Action(_));
                    all[row * tasks + task] =
                        if binary { 1.0 / (1.0 + (-value).exp()) } else { value };
                }
            }
        }
        all
    }

    fn learning_rate(&self) -> f64 {
        let warmup = (self.steps + 1) as f64 / self.config.warmup_steps.max(1) as f64;
        self.config.learning_rate * warmup.min(1.0)
    }

    fn learn(&mut self, loss: Tensor<A, 1>, leaf: &Tensor<A, 2>, batch: &Batch) -> Result<()> {
        let mut gradients = loss.backward();
        if let Some(sparse) = leaf.grad_remove(&mut gradients) {
            let rows = row_gradients(batch, sparse.into_data(), self.config.embedding_dim);
            let adagrad =
                Adagrad { learning_rate: self.config.sparse_learning_rate, epsilon: 1e-8 };
            self.store.adagrad(&batch.keys, &rows, &adagrad)?;
        }
        let gradients = GradientsParams::from_grads(gradients, &self.network);
        self.network = self.optimizer.step(self.learning_rate(), self.network.clone(), gradients);
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
        let batch = self.batcher.batch(examples, &self.statistics)?;
        if batch.targets() == 0 {
            return Ok(StepOutput {
                tae: vec![],
                predictions: vec![],
                labels: vec![],
                mask: vec![],
                loss: 0.0,
            });
        }
        let dim = self.config.embedding_dim;
        let mut rows = vec![0.0; batch.keys.len() * dim];
        self.store.gather_or_init(&batch.keys, &mut rows)?;
        let flat = embeddings(&batch, &rows, dim);
        let leaf = Tensor::<A, 2>::from_data(flat.clone(), &self.device).require_grad();
        let (forward, aligned) = self.forward(leaf.clone(), &batch)?;
        let loss = self.loss(&batch, forward.main.clone(), &aligned);
        let value =
            loss.clone().into_data().convert::<f32>().iter::<f32>().next().unwrap_or(f32::NAN);
        if !value.is_finite() {
            return Err(Error::Training {
                step: self.steps,
                message: format!("the loss is {value}; lower fm.learning_rate or set fm.clip_norm"),
            });
        }
        // With dropout the pass that learns is noisy, so predictions take a clean one.
        let said = if self.config.dropout > 0.0 {
            let attention = model::attention(&self.config, &batch)?;
            let clean = Tensor::<A::InnerBackend, 2>::from_data(flat, &self.device);
            output(
                self.network.model.valid().forward(clean, &batch, &attention),
                self.batcher.spec.main_tasks(),
            )
        } else {
            output(forward, self.batcher.spec.main_tasks())
        };
        let predictions = self.predictions(&batch, &said.main, &aligned);
        self.learn(loss, &leaf, &batch)?;
        self.requests += examples.len() as u64;
        self.trained_until_ms =
            examples.iter().map(|e| e.time_ms).fold(self.trained_until_ms, i64::max);
        Ok(StepOutput {
            tae: said.tae,
            predictions,
            labels: batch.labels,
            mask: batch.mask,
            loss: value,
        })
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
            self.store.snapshot_into(&draft.join("store"))?;
            manifest.write(draft)
        })
    }
}

/// Adds up the gradients `[H + R, fields * dim]` of every place where a key stood: `[keys, dim]`.
fn row_gradients(batch: &Batch, gradients: TensorData, dim: usize) -> Vec<f32> {
    let gradients = gradients.convert::<f32>();
    let flat = gradients.as_slice::<f32>().expect("converted to f32");
    let mut rows = vec![0.0; batch.keys.len() * dim];
    for (&index, part) in batch.key_index.iter().zip(flat.chunks_exact(dim)) {
        let at = index as usize * dim;
        rows[at..at + dim].iter_mut().zip(part).for_each(|(sum, &g)| *sum += g);
    }
    rows
}
