//! Checkpoints: a folder with `fm.json` (the manifest), `model.safetensors` (the weights that
//! serving needs), `alignment.safetensors` (the weights that only training needs) and `store/` (the
//! sparse embeddings without optimizer state).
//!
//! A checkpoint is written beside its final name and then renamed, so a folder with the final name
//! is always complete. Optimizer state is not part of a checkpoint; see `resume`.

use std::{collections::HashMap, fs, path::Path};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, TensorData, backend::Backend},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    batch::ColumnStatistics,
    spec::{FmConfig, FmSpec},
};

/// The version of `fm.json`'s format; other versions are refused.
const FORMAT: u32 = 1;

/// The content of `fm.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmManifest {
    /// The version of the file's format.
    pub format: u32,
    /// The FM version, a semantic version, that experts pin.
    pub version: String,
    /// The model's size and training settings.
    pub config: FmConfig,
    /// The data that the model was made for.
    pub spec: FmSpec,
    /// Frozen statistics of numeric columns.
    pub statistics: ColumnStatistics,
    /// The number of requests trained on.
    pub requests: u64,
    /// The time of the newest request trained on, in milliseconds since the epoch.
    pub trained_until_ms: i64,
}

impl FmManifest {
    /// The manifest of a model that has not been trained.
    pub fn new(
        version: &str,
        config: &FmConfig,
        spec: &FmSpec,
        statistics: &ColumnStatistics,
    ) -> Self {
        Self {
            format: FORMAT,
            version: version.into(),
            config: config.clone(),
            spec: spec.clone(),
            statistics: statistics.clone(),
            requests: 0,
            trained_until_ms: 0,
        }
    }

    /// Reads `fm.json` of a checkpoint.
    ///
    /// # Errors
    /// A file that is missing, unreadable or of another format.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("fm.json");
        let text = fs::read(&path).map_err(|error| {
            checkpoint_error(&path, format!("{error}; train one with `hypercast train fm`"))
        })?;
        let manifest: Self =
            serde_json::from_slice(&text).map_err(|error| checkpoint_error(&path, error))?;
        if manifest.format != FORMAT {
            return Err(checkpoint_error(
                &path,
                format!(
                    "has format {}, but this build reads format {FORMAT}; train the model again",
                    manifest.format
                ),
            ));
        }
        Ok(manifest)
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("fm.json");
        let text =
            serde_json::to_vec_pretty(self).map_err(|error| checkpoint_error(&path, error))?;
        fs::write(&path, text).map_err(|error| checkpoint_error(&path, error))
    }
}

/// Replaces the folder `dir` as a whole: `fill` writes a new folder beside it, which is then
/// renamed. After a crash, [`recover_directory`] restores a complete folder.
///
/// # Errors
/// Errors of `fill` or the file system; `dir` is then unchanged.
pub fn replace_directory<E: From<Error>>(
    dir: &Path,
    fill: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let draft = dir.with_extension("partial");
    let io = |error: std::io::Error| E::from(checkpoint_error(dir, error));
    recover_directory(dir)?;
    if draft.exists() {
        fs::remove_dir_all(&draft).map_err(io)?;
    }
    fs::create_dir_all(&draft).map_err(io)?;
    fill(&draft)?;
    let old = dir.with_extension("old");
    if old.exists() {
        // Left behind by a crash after the rename below.
        fs::remove_dir_all(&old).map_err(io)?;
    }
    if dir.exists() {
        fs::rename(dir, &old).map_err(io)?;
    }
    fs::rename(&draft, dir).map_err(io)?;
    if old.exists() {
        fs::remove_dir_all(&old).map_err(io)?;
    }
    Ok(())
}

/// Restores the old folder if a crash interrupted [`replace_directory`] between its two renames.
///
/// # Errors
/// Errors of the file system.
pub fn recover_directory(dir: &Path) -> Result<()> {
    let old = dir.with_extension("old");
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).map_err(|error| checkpoint_error(dir, error))?;
    }
    Ok(())
}

/// Saves every weight of a module under its path, for example `layers.0.uvqk.weight`.
pub(crate) fn save_weights<B: Backend, M: Module<B>>(module: &M, path: &Path) -> Result<()> {
    let weights = weights_of(module).into_iter().map(|(name, data)| named_tensor(name, data));
    write_tensors(&weights.collect::<Vec<_>>(), path)
}

/// A tensor as a safetensors file stores it.
pub(crate) struct NamedTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Little-endian f32 values, row-major.
    pub(crate) bytes: Vec<u8>,
}

/// Writes a safetensors file.
pub(crate) fn write_tensors(tensors: &[NamedTensor], path: &Path) -> Result<()> {
    let views = tensors
        .iter()
        .map(|NamedTensor { name, shape, bytes }| {
            TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.clone(), view))
        })
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| checkpoint_error(path, error))?;
    safetensors::serialize_to_file(views, None, path).map_err(|error| checkpoint_error(path, error))
}

/// Loads every weight of a module; none may be missing or have another shape.
pub(crate) fn load_weights<B: Backend, M: Module<B>>(
    module: M,
    path: &Path,
    device: &B::Device,
) -> Result<M> {
    assign_weights(module, read_tensors(path)?, device)
        .map_err(|fault| checkpoint_error(path, fault))
}

/// Sets every weight of a module; none may be missing or have another shape. The error names the
/// first that is.
pub(crate) fn assign_weights<B: Backend, M: Module<B>>(
    module: M,
    weights: TensorMap,
    device: &B::Device,
) -> std::result::Result<M, String> {
    let mut loader =
        WeightLoader { path: Vec::new(), weights, fault: None, device: device.clone() };
    let module = module.map(&mut loader);
    loader.fault.map_or(Ok(module), Err)
}

/// Every weight of a module with its path, for example `layers.0.uvqk.weight`.
pub(crate) fn weights_of<B: Backend, M: Module<B>>(module: &M) -> Vec<(String, TensorData)> {
    let mut collector = WeightCollector { path: Vec::new(), weights: Vec::new() };
    module.visit(&mut collector);
    collector.weights
}

/// Shapes and values of tensors, by name.
pub(crate) type TensorMap = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// Reads all tensors of a safetensors file.
pub(crate) fn read_tensors(path: &Path) -> Result<TensorMap> {
    let bytes = fs::read(path).map_err(|error| checkpoint_error(path, error))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| {
        checkpoint_error(path, format!("{error}; the file is damaged, use another checkpoint"))
    })?;
    Ok(file
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values = view
                .data()
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            (name, (view.shape().to_vec(), values))
        })
        .collect())
}

/// An error about a file or folder of a checkpoint or saved run.
pub(crate) fn checkpoint_error(path: &Path, message: impl ToString) -> Error {
    Error::Checkpoint { path: path.display().to_string(), message: message.to_string() }
}

struct WeightCollector {
    path: Vec<String>,
    weights: Vec<(String, TensorData)>,
}

impl<B: Backend> ModuleVisitor<B> for WeightCollector {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.weights.push((self.path.join("."), param.val().into_data()));
    }
}

/// Converts a tensor to f32 bytes.
pub(crate) fn named_tensor(name: String, data: TensorData) -> NamedTensor {
    let data = data.convert::<f32>();
    let shape = data.shape.iter().copied().collect();
    let bytes = data.iter::<f32>().flat_map(f32::to_le_bytes).collect();
    NamedTensor { name, shape, bytes }
}

struct WeightLoader<B: Backend> {
    path: Vec<String>,
    weights: TensorMap,
    fault: Option<String>,
    device: B::Device,
}

impl<B: Backend> ModuleMapper<B> for WeightLoader<B> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let name = self.path.join(".");
        let (id, old, mapper): (ParamId, _, _) = param.consume();
        let expected = old.dims().to_vec();
        let new = match self.weights.remove(&name) {
            Some((shape, values)) if shape == expected => {
                let tensor = Tensor::from_data(TensorData::new(values, shape), &self.device);
                if old.is_require_grad() { tensor.require_grad() } else { tensor }
            }
            Some((shape, _)) => {
                self.fault.get_or_insert(format!(
                    "{name} is {shape:?}, but the model needs {expected:?}"
                ));
                old
            }
            None => {
                self.fault.get_or_insert(format!("{name} {expected:?} is missing"));
                old
            }
        };
        Param::from_mapped_value(id, new, mapper)
    }
}
