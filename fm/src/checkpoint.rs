//! Checkpoints: a folder with `fm.json` (what the model is), `model.safetensors`
//! (what serving needs), `alignment.safetensors` (what only training needs) and
//! `store/` (the sparse embeddings without optimizer state).
//!
//! A checkpoint is written beside its final name and renamed, so a folder of
//! that name is always whole. Optimizer state is the trainer's, not a checkpoint's.

use std::{collections::HashMap, fs, path::Path};

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Tensor, TensorData, backend::Backend},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    batch::Statistics,
    spec::{FmConfig, FmSpec},
};

/// The format of `fm.json`; another one is refused.
const FORMAT: u32 = 1;

/// What `fm.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format of this file.
    pub format: u32,
    /// The FM version, as semver, that experts pin.
    pub version: String,
    /// The model's size.
    pub config: FmConfig,
    /// The model's data.
    pub spec: FmSpec,
    /// Frozen statistics of numeric columns.
    pub statistics: Statistics,
    /// Training requests seen.
    pub requests: u64,
    /// Time of the newest training request, milliseconds since the epoch.
    pub trained_until_ms: i64,
}

impl Manifest {
    /// A manifest of the current format.
    pub fn new(version: &str, config: &FmConfig, spec: &FmSpec, statistics: &Statistics) -> Self {
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
    /// A missing, unreadable or foreign file.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("fm.json");
        let text = fs::read(&path).map_err(|error| {
            failed(&path, format!("{error}; train one with `hypercast train fm`"))
        })?;
        let manifest: Self = serde_json::from_slice(&text).map_err(|error| failed(&path, error))?;
        if manifest.format != FORMAT {
            return Err(failed(
                &path,
                format!(
                    "format {}, but this build reads {FORMAT}; train it again",
                    manifest.format
                ),
            ));
        }
        Ok(manifest)
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("fm.json");
        let text = serde_json::to_vec_pretty(self).map_err(|error| failed(&path, error))?;
        fs::write(&path, text).map_err(|error| failed(&path, error))
    }
}

/// Writes a folder through `fill`, which is given a folder beside `dir`, and replaces `dir` by it.
///
/// # Errors
/// What `fill` or the file system says; `dir` is then as it was.
pub fn write_whole<E: From<Error>>(
    dir: &Path,
    fill: impl FnOnce(&Path) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let draft = dir.with_extension("partial");
    let io = |error: std::io::Error| E::from(failed(dir, error));
    restore_whole(dir)?;
    if draft.exists() {
        fs::remove_dir_all(&draft).map_err(io)?;
    }
    fs::create_dir_all(&draft).map_err(io)?;
    fill(&draft)?;
    let old = dir.with_extension("old");
    if old.exists() {
        // What was cut off after it had replaced `dir`.
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

/// Puts a folder back that [`write_whole`] had moved away when it was cut off.
///
/// # Errors
/// What the file system says.
pub fn restore_whole(dir: &Path) -> Result<()> {
    let old = dir.with_extension("old");
    if !dir.exists() && old.exists() {
        fs::rename(&old, dir).map_err(|error| failed(dir, error))?;
    }
    Ok(())
}

/// Saves every weight of a module under its path, for example `layers.0.uvqk.weight`.
pub(crate) fn save_weights<B: Backend, M: Module<B>>(module: &M, path: &Path) -> Result<()> {
    let weights = weights_of(module).into_iter().map(|(name, data)| named(name, data));
    write_tensors(&weights.collect::<Vec<_>>(), path)
}

/// A tensor's name, shape and little-endian f32 values.
pub(crate) type Named = (String, Vec<usize>, Vec<u8>);

/// Saves tensors.
pub(crate) fn write_tensors(tensors: &[Named], path: &Path) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            TensorView::new(Dtype::F32, shape.clone(), bytes).map(|view| (name.clone(), view))
        })
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| failed(path, error))?;
    safetensors::serialize_to_file(views, None, path).map_err(|error| failed(path, error))
}

/// Loads every weight of a module; none may be missing or of another shape.
pub(crate) fn load_weights<B: Backend, M: Module<B>>(
    module: M,
    path: &Path,
    device: &B::Device,
) -> Result<M> {
    place_weights(module, read_tensors(path)?, device).map_err(|fault| failed(path, fault))
}

/// Gives a module its weights; none may be missing or of another shape. The error says which is.
pub(crate) fn place_weights<B: Backend, M: Module<B>>(
    module: M,
    weights: Tensors,
    device: &B::Device,
) -> std::result::Result<M, String> {
    let mut loader = Loader { path: Vec::new(), weights, fault: None, device: device.clone() };
    let module = module.map(&mut loader);
    loader.fault.map_or(Ok(module), Err)
}

/// Every weight of a module, under its path.
pub(crate) fn weights_of<B: Backend, M: Module<B>>(module: &M) -> Vec<(String, TensorData)> {
    let mut collector = Collector { path: Vec::new(), weights: Vec::new() };
    module.visit(&mut collector);
    collector.weights
}

/// Tensors by name: shapes and values.
pub(crate) type Tensors = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// Loads all tensors of a file.
pub(crate) fn read_tensors(path: &Path) -> Result<Tensors> {
    let bytes = fs::read(path).map_err(|error| failed(path, error))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|error| {
        failed(path, format!("{error}; the file is damaged, take another checkpoint"))
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

pub(crate) fn failed(path: &Path, message: impl ToString) -> Error {
    Error::Checkpoint { path: path.display().to_string(), message: message.to_string() }
}

struct Collector {
    path: Vec<String>,
    weights: Vec<(String, TensorData)>,
}

impl<B: Backend> ModuleVisitor<B> for Collector {
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

/// A tensor under a name.
pub(crate) fn named(name: String, data: TensorData) -> Named {
    let data = data.convert::<f32>();
    let shape = data.shape.iter().copied().collect();
    (name, shape, data.iter::<f32>().flat_map(f32::to_le_bytes).collect())
}

struct Loader<B: Backend> {
    path: Vec<String>,
    weights: Tensors,
    fault: Option<String>,
    device: B::Device,
}

impl<B: Backend> ModuleMapper<B> for Loader<B> {
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
