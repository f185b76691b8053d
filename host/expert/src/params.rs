//! An expert's parameters: initialised, saved and loaded by the host.
//!
//! They are f32 in host memory, whatever the device: tables are read by rows, and dense parameters
//! are small. Files are safetensors with a [`Provenance`] in the metadata. The optimiser's state is
//! saved elsewhere (`train::saved`).

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_core::atomic_file;
use hypercast_fm::label_scale::{LabelScale, LabelScales};
use hypercast_fm::update::TensorSlice;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::error::{CommonErrors as _, Error};
use super::graph::{ExpertGraph, ParameterSpec, fnv1a};
use super::normalise::Normaliser;
use super::wasm::contract::{self, Description, Initialiser};

/// The metadata key of the [`Provenance`] in a parameter file.
const PROVENANCE: &str = "hypercast_expert";

/// The version of a parameter file's format.
const FORMAT: &str = "1";

/// The plugin, network and FM that a set of parameters belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The plugin's name.
    pub plugin: String,
    /// The plugin's version.
    pub plugin_version: String,
    /// The version of the expert contract.
    pub contract: String,
    /// [`ExpertGraph::hash`], in hex.
    pub graph: String,
    /// The version of the FM whose TAEs they were trained on; empty without an FM.
    pub fm_version: String,
    /// The width of those TAEs.
    pub tae_dim: usize,
    /// The tasks' names, in order.
    pub tasks: Vec<String>,
    /// The number of rows trained on so far.
    pub trained_rows: u64,
    /// Time of the newest request trained on, in milliseconds since 1970; 0 if unknown.
    #[serde(default)]
    pub trained_until_ms: i64,
    /// The standardisation of numeric features that they were trained with.
    pub normaliser: Normaliser,
    /// The scales on which tasks were learned; one that has none was learned as plain log odds, or
    /// in its label's unit, as before there were scales.
    #[serde(default, skip_serializing_if = "LabelScales::is_empty", with = "text_only")]
    pub labels: LabelScales,
}

/// Binary forms, in which each field has its place, are as they were before there were scales;
/// whoever writes one keeps the scales behind it.
mod text_only {
    use hypercast_fm::label_scale::LabelScales;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    pub(super) fn serialize<S: Serializer>(labels: &LabelScales, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() { labels.serialize(to) } else { to.serialize_unit() }
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(from: D) -> Result<LabelScales, D::Error> {
        if from.is_human_readable() {
            LabelScales::deserialize(from)
        } else {
            Ok(LabelScales::default())
        }
    }
}

impl Provenance {
    /// The provenance of parameters that were not trained yet.
    pub fn new(
        description: &Description,
        graph: &ExpertGraph,
        fm_version: &str,
        tae_dim: usize,
        normaliser: Normaliser,
    ) -> Provenance {
        Provenance {
            plugin: description.name.clone(),
            plugin_version: description.version.clone(),
            contract: contract::VERSION.to_owned(),
            graph: hash_text(graph),
            fm_version: fm_version.to_owned(),
            tae_dim,
            tasks: description.tasks.iter().map(|task| task.name.clone()).collect(),
            trained_rows: 0,
            trained_until_ms: 0,
            normaliser,
            labels: LabelScales::new(),
        }
    }

    /// Takes over the scales of the tasks that parameters of `trained` predict, since their
    /// values mean what they do on those scales alone. A binary task that is new begins beside
    /// those.
    fn take_scales(&mut self, trained: &Provenance) {
        let beside = LabelScale::of_rate_beside(&trained.labels);
        for (task, scale) in &mut self.labels {
            if matches!(scale, LabelScale::Rate(_)) && !trained.tasks.contains(task) {
                scale.clone_from(&beside);
            }
        }
        for task in trained.tasks.iter().filter(|task| self.tasks.contains(task)) {
            match trained.labels.get(task) {
                Some(scale) => _ = self.labels.insert(task.clone(), scale.clone()),
                None => _ = self.labels.remove(task),
            }
        }
    }
}

/// Weights of an expert, as a trainer published them.
#[derive(Debug, Clone, Copy)]
pub struct ParameterUpdate<'a> {
    /// Their [`Provenance`] as JSON.
    pub provenance: &'a str,
    /// Ranges of values, each of a named parameter.
    pub pieces: &'a [TensorSlice],
    /// Whether they are all of the expert's values, or only those that changed most.
    pub is_whole: bool,
    /// The number of embedding rows beside them; valid updates of an expert have none.
    pub rows: usize,
}

/// Parameter values in the order of a graph's parameters, with their provenance. Clones share the
/// values until one of them changes.
#[derive(Debug, Clone)]
pub struct Parameters {
    specs: Vec<ParameterSpec>,
    values: Vec<Arc<Vec<f32>>>,
    /// The plugin, network and FM that they belong to.
    pub provenance: Provenance,
}

/// The content of a parameter file: checked for damage, not yet matched with a graph.
#[derive(Debug, Clone)]
pub struct SavedParameters {
    tensors: HashMap<String, SavedTensor>,
    /// The plugin, network and FM that they belong to.
    pub provenance: Provenance,
    path: PathBuf,
}

#[derive(Debug, Clone)]
struct SavedTensor {
    shape: Vec<usize>,
    values: Vec<f32>,
}

/// Which parameters a warm start initialised from trained ones.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WarmStart {
    /// Names of the parameters that now have trained values.
    pub kept: Vec<String>,
    /// Names of the parameters that were not taken over: new ones, or ones of another shape.
    pub fresh: Vec<String>,
}

impl Parameters {
    /// Fresh parameters. Each has the values that the plugin gave it, or depends on `seed` and its
    /// own name alone, so that a new parameter does not change the others.
    pub fn init(graph: &ExpertGraph, provenance: Provenance, seed: u64) -> Parameters {
        let begin = |spec: &ParameterSpec| {
            spec.values.clone().unwrap_or_else(|| Arc::new(initial(spec, seed)))
        };
        let values = graph.parameters.iter().map(begin).collect();
        Parameters { specs: graph.parameters.clone(), values, provenance }
    }

    /// Takes the values of all saved parameters with the same name and shape, and the scales of
    /// their tasks.
    pub fn warm_start(&mut self, saved: &SavedParameters) -> WarmStart {
        self.provenance.take_scales(&saved.provenance);
        self.take_values(|spec| {
            let tensor = saved.tensors.get(&spec.name)?;
            (tensor.shape == spec.shape).then_some(tensor.values.as_slice())
        })
    }

    /// Takes the values of all parameters of `other` with the same name and shape whose name
    /// `accepts`, and the scales of its tasks.
    pub fn warm_start_from(
        &mut self,
        other: &Parameters,
        accepts: impl Fn(&str) -> bool,
    ) -> WarmStart {
        self.provenance.take_scales(&other.provenance);
        self.take_values(|spec| {
            let fits = |own: &ParameterSpec| own.name == spec.name && own.shape == spec.shape;
            let index = other.specs.iter().position(fits).filter(|_| accepts(&spec.name))?;
            Some(other.values(index))
        })
    }

    fn take_values<'a>(
        &mut self,
        trained: impl Fn(&ParameterSpec) -> Option<&'a [f32]>,
    ) -> WarmStart {
        let mut report = WarmStart::default();
        for (spec, values) in self.specs.iter().zip(&mut self.values) {
            if let Some(trained) = trained(spec) {
                *values = Arc::new(trained.to_vec());
                report.kept.push(spec.name.clone());
            } else {
                report.fresh.push(spec.name.clone());
            }
        }
        report
    }

    /// The trained parameters of exactly this graph, for serving.
    pub fn restore(graph: &ExpertGraph, mut saved: SavedParameters) -> Result<Parameters, Error> {
        let path = saved.path.clone();
        let refused = |why: String| {
            let why = format!("{why}; train the expert again (a warm start keeps what fits)");
            Error::Parameters { path: path.clone(), why }
        };
        let plugin = &graph.plugin;
        let take =
            |ParameterSpec { name, shape, .. }: &ParameterSpec| match saved.tensors.remove(name) {
                Some(tensor) if tensor.shape == *shape => Ok(Arc::new(tensor.values)),
                Some(SavedTensor { shape: found, .. }) => Err(refused(format!(
                    "parameter `{name}` has shape {found:?}, but the network of expert `{plugin}` \
                     needs {shape:?}"
                ))),
                None => Err(refused(format!("it lacks parameter `{name}` of expert `{plugin}`"))),
            };
        let values = graph.parameters.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        if saved.provenance.graph != hash_text(graph) {
            return Err(refused(format!(
                "it was trained for another network of `{}` (version {})",
                saved.provenance.plugin, saved.provenance.plugin_version
            )));
        }
        Ok(Parameters { specs: graph.parameters.clone(), values, provenance: saved.provenance })
    }

    /// Parameters of a graph from their values in its order; none if the lengths do not fit.
    pub(super) fn with_values(
        graph: &ExpertGraph,
        values: Vec<Vec<f32>>,
        provenance: Provenance,
    ) -> Option<Parameters> {
        let lengths = graph.parameters.iter().map(ParameterSpec::len);
        let fits = lengths.eq(values.iter().map(Vec::len));
        let values = values.into_iter().map(Arc::new).collect();
        fits.then(|| Parameters { specs: graph.parameters.clone(), values, provenance })
    }

    /// A copy of all values, in the graph's order.
    pub(super) fn to_values(&self) -> Vec<Vec<f32>> {
        self.values.iter().map(|values| values.to_vec()).collect()
    }

    /// Writes a safetensors file. A reader finds the old file or the complete new one.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let bytes = |values: &Arc<Vec<f32>>| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let bytes: Vec<Vec<u8>> = self.values.iter().map(bytes).collect();
        let views = self.specs.iter().zip(&bytes).map(|(spec, bytes)| {
            let view = TensorView::new(Dtype::F32, spec.shape.clone(), bytes)
                .expect("the bytes fit the shape");
            (spec.name.as_str(), view)
        });
        let provenance =
            serde_json::to_string(&self.provenance).expect("a plain struct serialises");
        let tensors = self.tensors().map(|(name, _, values)| checksum(name, values));
        let checksum = checksum_text(tensors);
        let metadata =
            [(PROVENANCE, provenance), ("checksum", checksum), ("format", FORMAT.into())];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value)).into();
        let file = safetensors::serialize(views, Some(metadata))
            .map_err(|error| Error::data(path, error.to_string()))?;
        atomic_file::write(path, &file).map_err(Error::io(path))
    }

    /// Name, shape and values of every parameter.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let values = self.specs.iter().zip(&self.values);
        values.map(|(spec, values)| (spec.name.as_str(), spec.shape.as_slice(), values.as_slice()))
    }

    /// A copy with the published weights `update` of the same expert.
    ///
    /// # Errors
    /// The update is for another network or FM, a value does not fit or is not finite, or a whole
    /// update lacks values.
    pub fn apply(&self, update: &ParameterUpdate<'_>) -> Result<Parameters, Error> {
        let refused =
            |why: String| Error::Published { plugin: self.provenance.plugin.clone(), why };
        let provenance: Provenance = serde_json::from_str(update.provenance)
            .map_err(|error| refused(format!("their provenance cannot be parsed: {error}")))?;
        let Provenance { plugin, graph, fm_version, .. } = &self.provenance;
        if (&provenance.plugin, &provenance.graph) != (plugin, graph) {
            let Provenance { plugin, plugin_version, .. } = &provenance;
            return Err(refused(format!(
                "they are of another network, of {plugin} {plugin_version}"
            )));
        }
        if provenance.fm_version != *fm_version {
            let found = &provenance.fm_version;
            return Err(refused(format!("they are for FM {found:?}, and not for {fm_version:?}")));
        }
        let mut new = Parameters { provenance, ..self.clone() };
        let mut count = 0;
        for TensorSlice { name, shape, start, values } in update.pieces {
            let index =
                self.specs.iter().position(|spec| spec.name == *name && spec.shape == *shape);
            let end = start.checked_add(values.len());
            let range = index
                .zip(end)
                .and_then(|(index, end)| new.values_mut(index).get_mut(*start..end))
                .ok_or_else(|| {
                    let count = values.len();
                    refused(format!("the network has no {count} values of `{name}` {shape:?}"))
                })?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(refused(format!("`{name}` has a value that is not finite")));
            }
            range.copy_from_slice(values);
            count += values.len();
        }
        if (update.is_whole && count != self.count()) || update.rows > 0 {
            return Err(refused(format!("they have {count} of {} values", self.count())));
        }
        Ok(new)
    }

    /// The number of values over all parameters.
    pub fn count(&self) -> usize {
        self.values.iter().map(|values| values.len()).sum()
    }

    /// The values of parameter `index`, row-major.
    pub fn values(&self, index: usize) -> &[f32] {
        &self.values[index]
    }

    /// The values of parameter `index`, row-major, without a copy.
    pub(super) fn shared_values(&self, index: usize) -> Arc<Vec<f32>> {
        self.values[index].clone()
    }

    /// The values of parameter `index`, to be changed.
    pub fn values_mut(&mut self, index: usize) -> &mut [f32] {
        let values: &mut Vec<f32> = Arc::make_mut(&mut self.values[index]);
        values
    }

    /// The values of the parameter called `name`.
    pub fn by_name(&self, name: &str) -> Option<&[f32]> {
        let index = self.specs.iter().position(|spec| spec.name == name)?;
        Some(&self.values[index])
    }

    /// The given rows of a table, concatenated.
    pub fn gather(&self, index: usize, rows: &[u32]) -> Vec<f32> {
        let width = self.specs[index].shape[1];
        let row = |row: &u32| &self.values[index][*row as usize * width..][..width];
        rows.iter().flat_map(row).copied().collect()
    }
}

impl SavedParameters {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<SavedParameters, Error> {
        SavedParameters::from_bytes(&std::fs::read(path).map_err(Error::io(path))?, path)
    }

    /// The file that it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks the content of the file at `path`.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<SavedParameters, Error> {
        parse(bytes, path).map_err(|why| Error::Parameters { path: path.to_path_buf(), why })
    }
}

/// [`ExpertGraph::hash`] as the text in a [`Provenance`].
pub fn hash_text(graph: &ExpertGraph) -> String {
    format!("{:016x}", graph.hash)
}

fn parse(bytes: &[u8], path: &Path) -> Result<SavedParameters, String> {
    let damaged = |what: String| {
        format!("it is no safetensors file, or a damaged one ({what}); train the expert again")
    };
    let (_, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| damaged(error.to_string()))?;
    let file = SafeTensors::deserialize(bytes).map_err(|error| damaged(error.to_string()))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let provenance = metadata
        .get(PROVENANCE)
        .ok_or("it is a safetensors file, but not one of an expert's parameters")?;
    // Files of before there was such a key are of format 1.
    let format = metadata.get("format").map_or(FORMAT, String::as_str);
    refuse_if!(format != FORMAT, "it has format {format}, this version reads {FORMAT}");
    let provenance: Provenance = serde_json::from_str(provenance)
        .map_err(|error| format!("its provenance cannot be parsed: {error}"))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.tensors() {
        refuse_if!(view.dtype() != Dtype::F32, "parameter `{name}` is {:?}, not f32", view.dtype());
        let values = view.data().chunks_exact(4);
        let values: Vec<f32> =
            values.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(damaged(format!("parameter `{name}` has a value that is not finite")));
        }
        tensors.insert(name, SavedTensor { shape: view.shape().to_vec(), values });
    }
    let found = checksum_text(tensors.iter().map(|(name, tensor)| checksum(name, &tensor.values)));
    if metadata.get("checksum") != Some(&found) {
        return Err(damaged("its checksum differs".into()));
    }
    Ok(SavedParameters { tensors, provenance, path: path.to_path_buf() })
}

fn checksum(name: &str, values: &[f32]) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    let start = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| mix(hash, byte.into()));
    values.iter().fold(start, |hash, value| mix(hash, value.to_bits().into()))
}

/// The checksum of a file in its metadata. It does not depend on the order of the parameters.
fn checksum_text(checksums: impl Iterator<Item = u64>) -> String {
    format!("{:016x}", checksums.fold(0, u64::wrapping_add))
}

fn initial(spec: &ParameterSpec, seed: u64) -> Vec<f32> {
    let mut rng = SmallRng::seed_from_u64(fnv1a(seed, spec.name.as_bytes()));
    let last = spec.shape[spec.shape.len() - 1];
    let (fan_in, fan_out) = (spec.len() / last, last);
    let mut uniform =
        |bound: f32| (0..spec.len()).map(|_| rng.random_range(-bound..=bound)).collect();
    match spec.init {
        Initialiser::Zeros => vec![0.0; spec.len()],
        Initialiser::Ones => vec![1.0; spec.len()],
        Initialiser::Constant(value) => vec![value; spec.len()],
        Initialiser::XavierUniform => uniform((6.0 / (fan_in + fan_out) as f32).sqrt()),
        Initialiser::KaimingUniform => uniform((1.0 / fan_in as f32).sqrt()),
        Initialiser::Normal(deviation) => {
            (0..spec.len()).map(|_| deviation * normal(&mut rng)).collect()
        }
    }
}

/// A standard normal value (Box and Muller).
fn normal(rng: &mut SmallRng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
    (radius * (std::f64::consts::TAU * rng.random::<f64>()).cos()) as f32
}
