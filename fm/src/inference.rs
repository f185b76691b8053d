//! Serving side of the FM: a checkpoint gives TAEs and the main tasks'
//! predictions for requests.
//!
//! It loads only what the TAE needs ("inference pruning", section 3.3.3):
//! no alignment modules, no optimizer state. It does not cache histories.

use std::path::Path;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use hypercast_kernels::attention::HstuBackend;
use hypercast_store::StoreReader;

use crate::{
    Result,
    batch::{Batch, Batcher},
    checkpoint::{Manifest, load_weights},
    device::{Cpu, DeviceKind},
    example::Example,
    model::{self, Embedded, FmModel, Forward},
    sampling::parts,
    spec::{Label, TaskSpec},
};

/// What the FM says of the targets of some requests.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FmOutput {
    /// `[rows * tae_dim]`, the target-aware embeddings.
    pub tae: Vec<f32>,
    /// `[rows * main tasks]`: probabilities of binary tasks, values of regressions.
    pub main: Vec<f32>,
}

/// A loaded FM, whatever its device.
pub trait FoundationModel: Send + Sync {
    /// What the checkpoint says of itself.
    fn manifest(&self) -> &Manifest;

    /// TAEs and main predictions of every target, in order.
    ///
    /// # Errors
    /// An example that does not fit the model.
    fn infer(&self, examples: &[&Example]) -> Result<FmOutput>;
}

/// Loads a checkpoint on a device.
///
/// # Errors
/// A checkpoint that is missing, damaged or foreign, or a device that is not in this build.
pub fn load(dir: &Path, device: DeviceKind) -> Result<Box<dyn FoundationModel>> {
    device.check()?;
    match device {
        DeviceKind::Cpu => Ok(Box::new(Loaded::<Cpu>::open(dir)?)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Box::new(Loaded::<crate::device::Cuda>::open(dir)?)),
        #[cfg(not(feature = "cuda"))]
        DeviceKind::Cuda => unreachable!("check() refuses it"),
    }
}

/// What a pass may take in memory, about; more requests are several passes.
const SERVING_BYTES: usize = 512 << 20;

struct Loaded<B: Backend> {
    manifest: Manifest,
    model: FmModel<B>,
    batcher: Batcher,
    store: StoreReader,
    device: B::Device,
}

impl<B: HstuBackend> Loaded<B> {
    fn open(dir: &Path) -> Result<Self> {
        let manifest = Manifest::read(dir)?;
        let device = B::Device::default();
        let fresh = FmModel::new(&manifest.config, &manifest.spec, &device);
        let model = load_weights(fresh, &dir.join("model.safetensors"), &device)?;
        let batcher = Batcher::new(&manifest.spec, &manifest.config);
        Ok(Self { model, batcher, store: StoreReader::open(dir.join("store"))?, device, manifest })
    }
}

impl<B: HstuBackend> FoundationModel for Loaded<B>
where
    FmModel<B>: Sync,
{
    fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn infer(&self, examples: &[&Example]) -> Result<FmOutput> {
        let mut output = FmOutput::default();
        for part in parts(examples, &self.manifest.config, examples.len(), SERVING_BYTES) {
            let of_part = self.pass(part)?;
            output.tae.extend(of_part.tae);
            output.main.extend(of_part.main);
        }
        Ok(output)
    }
}

impl<B: HstuBackend> Loaded<B> {
    fn pass(&self, examples: &[&Example]) -> Result<FmOutput> {
        let batch = self.batcher.batch(examples, &self.manifest.statistics)?;
        if batch.targets() == 0 {
            return Ok(FmOutput::default());
        }
        let dim = self.manifest.config.embedding_dim;
        let mut rows = vec![0.0; batch.keys.len() * dim];
        self.store.gather(&batch.keys, &mut rows);
        let embedded = Gathered::new(&batch, &rows, dim).tensors(&self.device);
        let attention = model::attention(&self.manifest.config, &batch)?;
        let forward = self.model.forward(embedded, &batch, &attention);
        Ok(output(forward, self.manifest.spec.main_tasks()))
    }
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
