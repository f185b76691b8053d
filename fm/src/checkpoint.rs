//! Checkpoints: a folder with `fm.json` (the manifest), `model.safetensors` (the weights that
//! serving needs), `alignment.safetensors` (the weights that only training needs) and `store/` (the
//! sparse embeddings without optimizer state).
//!
//! A checkpoint is written beside its final name and then renamed, so a folder with the final name
//! is always complete. Optimizer state is not part of a checkpoint; see `resume`.

use std::{
    borrow::Cow,
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, TensorData, backend::Backend},
};
use hypercast_core::{atomic_dir, atomic_file};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};

use crate::{
    Error, Result,
    batch::ColumnStatistics,
    growth::SpecGrowth,
    row_keys::{GROWN_FORMAT, RowKeys},
    spec::{FmConfig, FmSpec},
    update::WeightTensor,
};

/// The version of the format of checkpoints and saved runs that are new: since 2 the store's keys
/// have all bits of an id. Those of version 1 are read, and go on as they are.
pub const FORMAT: u32 = 2;

/// The newest format that this build reads: that of models whose data has grown fields.
const NEWEST_FORMAT: u32 = GROWN_FORMAT;

/// The content of `fm.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FmManifest {
    /// The version of the file's format.
    pub format: u32,
    /// The FM version, a semantic version, that experts pin.
    pub version: String,
    /// The model's size and training settings.
    #[serde(deserialize_with = "stored_config")]
    pub config: FmConfig,
    /// The data that the model was made for.
    pub spec: FmSpec,
    /// Frozen statistics of numeric columns.
    pub statistics: ColumnStatistics,
    /// The number of requests trained on.
    pub requests: u64,
    /// The time of the newest request trained on, in milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// The number of each field of a token, then of each profile field, that its rows' keys have;
    /// empty if it is the field's index, as in a model whose data has not grown.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub field_numbers: Vec<u8>,
}

impl FmManifest {
    /// Reads `fm.json` of a checkpoint.
    ///
    /// # Errors
    /// A file that is missing, unreadable, or of a format that this build does not read.
    pub fn read(dir: &Path) -> Result<Self> {
        Self::read_in(&current_checkpoint(dir))
    }

    /// The same of the very folder `dir`.
    fn read_in(dir: &Path) -> Result<Self> {
        let path = dir.join("fm.json");
        let manifest: Self = read_json(&path, "train one with `hypercast train fm`")?;
        check_format(manifest.format, &path)?;
        Ok(manifest)
    }

    /// The keys of its store's rows.
    pub(crate) fn row_keys(&self) -> RowKeys {
        RowKeys::of_format(self.format)
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        write_json(self, &dir.join("fm.json"))
    }
}

/// The configuration that is stored with a model. One of before the key had no anchors, whatever a
/// new model has.
pub(crate) fn stored_config<'de, D: Deserializer<'de>>(
    stored: D,
) -> std::result::Result<FmConfig, D::Error> {
    let mut config = FmConfig::deserialize(stored)?;
    config.history_anchors.get_or_insert(0);
    Ok(config)
}

/// Refuses a checkpoint or saved run of a format that this build cannot read.
pub(crate) fn check_format(format: u32, path: &Path) -> Result<()> {
    if (1..=NEWEST_FORMAT).contains(&format) {
        return Ok(());
    }
    let fault = format!(
        "has format {format}, but this build reads formats 1 to {NEWEST_FORMAT}; use the build that wrote \
         it, or train the model again"
    );
    Err(checkpoint_error(path, fault))
}

/// Reads a JSON file; `hint` says what to do if there is none.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path, hint: &str) -> Result<T> {
    let text =
        fs::read(path).map_err(|error| checkpoint_error(path, format!("{error}; {hint}")))?;
    serde_json::from_slice(&text).map_err(|error| checkpoint_error(path, error))
}

pub(crate) fn write_json(value: &impl Serialize, path: &Path) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| checkpoint_error(path, error))?;
    atomic_file::write(path, &text).map_err(|error| checkpoint_error(path, error))
}

/// Replaces the checkpoint `dir` as a whole by what `fill` writes.
///
/// # Errors
/// Errors of `fill` or the file system; `dir` is then unchanged.
pub(crate) fn replace_checkpoint(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let current = current_checkpoint(dir);
    if current != dir {
        atomic_file::rename(&current, dir).map_err(|error| checkpoint_error(dir, error))?;
    }
    atomic_dir::replace(dir, fill)
}

/// The folder to read a checkpoint from: `dir`, or what a replacement that was cut off has left.
/// Version 0.1.0 of hypercast set both `fm-1.0.0` and `fm-1.0.1` aside as `fm-1.0.old`; such a
/// folder counts if it is of this version.
pub(crate) fn current_checkpoint(dir: &Path) -> PathBuf {
    let current = atomic_dir::current(dir);
    let early = dir.with_extension("old");
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    let is_early = !current.exists()
        && FmManifest::read_in(&early).is_ok_and(|manifest| name.ends_with(&manifest.version));
    if is_early { early } else { current }
}

/// Saves every weight of a module under its path, for example `layers.0.uvqk.weight`.
pub(crate) fn save_weights<B: Backend, M: Module<B>>(module: &M, path: &Path) -> Result<()> {
    write_tensors(WeightTensor::of(module), path)
}

/// Writes a safetensors file.
pub(crate) fn write_tensors(tensors: Vec<WeightTensor>, path: &Path) -> Result<()> {
    let tensors = tensors.iter().map(|tensor| (&tensor.name, tensor));
    safetensors::serialize_to_file(tensors, None, path)
        .map_err(|error| checkpoint_error(path, error))
}

impl View for &WeightTensor {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        size_of_val(&*self.values)
    }
}

/// Loads every weight of a module, whose data may have grown since; none may be missing or have
/// another shape.
pub(crate) fn load_weights<B: Backend, M: Module<B>>(
    module: M,
    path: &Path,
    growth: Option<&SpecGrowth>,
    embedding_dim: usize,
) -> Result<M> {
    let mut tensors = read_tensors(path)?;
    if let Some(growth) = growth {
        tensors = growth.tensors(embedding_dim, tensors, WeightTensor::of(&module));
    }
    assign_weights(module, tensors).map_err(|fault| checkpoint_error(path, fault))
}

/// Sets every weight of a module; none may be missing or have another shape. The error names the
/// first that is.
pub(crate) fn assign_weights<B: Backend, M: Module<B>>(
    module: M,
    weights: TensorMap,
) -> std::result::Result<M, String> {
    let mut loader = WeightLoader { names: names_of(&module), weights, fault: None };
    let module = module.map(&mut loader);
    loader.fault.map_or(Ok(module), Err)
}

/// A weight of a module.
pub(crate) struct ModuleWeight<B: Backend> {
    pub(crate) id: ParamId,
    /// The path, for example `layers.0.uvqk.weight`.
    pub(crate) name: String,
    /// A handle, not a copy.
    pub(crate) value: B::FloatTensorPrimitive,
}

/// Every weight of a module, in the order in which a mapper sees them.
pub(crate) fn weights_of<B: Backend, M: Module<B>>(module: &M) -> Vec<ModuleWeight<B>> {
    let mut collector = WeightCollector { path: Vec::new(), weights: Vec::new() };
    module.visit(&mut collector);
    collector.weights
}

/// The paths of a module's weights.
pub(crate) fn names_of<B: Backend, M: Module<B>>(module: &M) -> HashMap<ParamId, String> {
    weights_of(module).into_iter().map(|weight| (weight.id, weight.name)).collect()
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
            let (bytes, _) = view.data().as_chunks();
            let values = bytes.iter().map(|value| f32::from_le_bytes(*value)).collect();
            (name, (view.shape().to_vec(), values))
        })
        .collect())
}

/// An error about a file or folder of a checkpoint or saved run.
pub(crate) fn checkpoint_error(path: &Path, message: impl ToString) -> Error {
    Error::Checkpoint { path: path.display().to_string(), message: message.to_string() }
}

struct WeightCollector<B: Backend> {
    path: Vec<String>,
    weights: Vec<ModuleWeight<B>>,
}

impl<B: Backend> ModuleVisitor<B> for WeightCollector<B> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let (name, value) = (self.path.join("."), param.val().into_primitive().tensor());
        self.weights.push(ModuleWeight { id: param.id, name, value });
    }
}

struct WeightLoader {
    names: HashMap<ParamId, String>,
    weights: TensorMap,
    fault: Option<String>,
}

impl<B: Backend> ModuleMapper<B> for WeightLoader {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let (name, expected) = (&self.names[&id], old.dims().to_vec());
        let new = match self.weights.remove(name) {
            Some((shape, values)) if shape == expected => {
                let tensor = Tensor::from_data(TensorData::new(values, shape), &old.device());
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
