//! An expert's parameters: owned, initialised, saved and loaded by the host.
//!
//! They live in host memory as f32, whatever the device: tables are read by
//! rows, dense parameters are small. Files are safetensors, with what they
//! belong to in the metadata. Optimiser state is the trainer's (`train::saved`).

use std::collections::HashMap;
use std::path::Path;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};

use super::Error;
use super::graph::{Graph, ParameterSpec};
use super::normalise::Normaliser;
use super::wasm::contract::Initialiser;
use hypercast_fm::update::TensorSlice;

/// The metadata key under which [`Provenance`] is kept.
const PROVENANCE: &str = "hypercast_expert";

/// What a set of parameters belongs to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// The plugin's name.
    pub plugin: String,
    /// The plugin's version.
    pub plugin_version: String,
    /// The contract's version.
    pub contract: String,
    /// [`Graph::hash`], in hex.
    pub graph: String,
    /// The version of the FM whose TAEs it was trained on; empty without an FM.
    pub fm_version: String,
    /// The width of those TAEs.
    pub tae_dim: usize,
    /// The tasks, in order.
    pub tasks: Vec<String>,
    /// Rows trained on so far.
    pub trained_rows: u64,
    /// Time of the newest request trained on, milliseconds since the epoch; 0 where that is not known.
    #[serde(default)]
    pub trained_until_ms: i64,
    /// The standardisation of numeric features that it was trained with.
    pub normaliser: Normaliser,
}

/// Published weights of an expert.
#[derive(Debug, Clone, Copy)]
pub struct ParameterUpdate<'a> {
    /// The [`Provenance`] that goes with them, as JSON.
    pub provenance: &'a str,
    /// The values.
    pub pieces: &'a [TensorSlice],
    /// Whether they are all of the expert's values, or those that moved most.
    pub is_whole: bool,
    /// Embedding rows beside them; an expert has none.
    pub rows: usize,
}

/// Parameter values in the order of a graph, with their provenance.
#[derive(Debug, Clone)]
pub struct Parameters {
    specs: Vec<ParameterSpec>,
    values: Vec<Vec<f32>>,
    /// What they belong to.
    pub provenance: Provenance,
}

/// A parameter file, checked to be whole, not yet matched with a graph.
#[derive(Debug, Clone)]
pub struct SavedParameters {
    tensors: HashMap<String, (Vec<usize>, Vec<f32>)>,
    /// What they belong to.
    pub provenance: Provenance,
    path: std::path::PathBuf,
}

/// What a warm start took over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct WarmStart {
    /// Names of the parameters that keep their trained values.
    pub kept: Vec<String>,
    /// Names of those that start afresh: new, or of another shape.
    pub fresh: Vec<String>,
}

impl Parameters {
    /// Fresh parameters. Each depends on `seed` and its own name alone, so that
    /// adding one changes no other.
    pub fn init(graph: &Graph, provenance: Provenance, seed: u64) -> Parameters {
        let values = graph.parameters.iter().map(|spec| initial(spec, seed)).collect();
        Parameters { specs: graph.parameters.clone(), values, provenance }
    }

    /// Takes the values of every parameter whose name and shape stayed.
    pub fn warm_start(&mut self, saved: &SavedParameters) -> WarmStart {
        let mut report = WarmStart::default();
        for (spec, values) in self.specs.iter().zip(&mut self.values) {
            match saved.tensors.get(&spec.name) {
                Some((shape, trained)) if *shape == spec.shape => {
                    values.copy_from_slice(trained);
                    report.kept.push(spec.name.clone());
                }
                _ => report.fresh.push(spec.name.clone()),
            }
        }
        report
    }

    /// Takes the values of `other` for every parameter that `takes` accepts by name and whose shape
    /// is the same.
    pub fn warm_start_from(
        &mut self,
        other: &Parameters,
        takes: impl Fn(&str) -> bool,
    ) -> WarmStart {
        let mut report = WarmStart::default();
        for (spec, values) in self.specs.iter().zip(&mut self.values) {
            let theirs = other.specs.iter().position(|own| own.name == spec.name);
            match theirs.filter(|&at| takes(&spec.name) && other.specs[at].shape == spec.shape) {
                Some(at) => {
                    values.copy_from_slice(&other.values[at]);
                    report.kept.push(spec.name.clone());
                }
                None => report.fresh.push(spec.name.clone()),
            }
        }
        report
    }

    /// The trained parameters of exactly this graph, for serving.
    pub fn restore(graph: &Graph, mut saved: SavedParameters) -> Result<Parameters, Error> {
        let path = saved.path.clone();
        let refused = |why: String| Error::Parameters { path: path.clone(), why };
        let take = |spec: &ParameterSpec| match saved.tensors.remove(&spec.name) {
            Some((shape, values)) if shape == spec.shape => Ok(values),
            Some((shape, _)) => Err(refused(format!(
                "parameter `{}` has shape {shape:?}, but the network of expert `{}` wants {:?}; train the expert again (a warm start keeps what fits)",
                spec.name, graph.plugin, spec.shape
            ))),
            None => Err(refused(format!(
                "it lacks parameter `{}` of expert `{}`; train the expert again (a warm start keeps what fits)",
                spec.name, graph.plugin
            ))),
        };
        let values = graph.parameters.iter().map(take).collect::<Result<Vec<_>, _>>()?;
        if saved.provenance.graph != hash_text(graph) {
            return Err(refused(format!(
                "it was trained for another network of `{}` (version {}); train the expert again (a warm start keeps what fits)",
                saved.provenance.plugin, saved.provenance.plugin_version
            )));
        }
        Ok(Parameters { specs: graph.parameters.clone(), values, provenance: saved.provenance })
    }

    /// Parameters of a graph from their values in its order, if they fit.
    pub(super) fn with_values(
        graph: &Graph,
        values: Vec<Vec<f32>>,
        provenance: Provenance,
    ) -> Option<Parameters> {
        let lengths = graph.parameters.iter().map(ParameterSpec::len);
        let fit = lengths.eq(values.iter().map(Vec::len));
        fit.then(|| Parameters { specs: graph.parameters.clone(), values, provenance })
    }

    /// The values of every parameter, in the graph's order.
    pub(super) fn all_values(&self) -> &[Vec<f32>] {
        &self.values
    }

    /// Writes a safetensors file: to a temporary name first, so that no reader
    /// ever sees half of one.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let bytes: Vec<Vec<u8>> = self.values.iter().map(|values| to_bytes(values)).collect();
        let views = self.specs.iter().zip(&bytes).map(|(spec, bytes)| {
            let view = TensorView::new(Dtype::F32, spec.shape.clone(), bytes)
                .expect("the bytes fit the shape");
            (spec.name.as_str(), view)
        });
        let provenance =
            serde_json::to_string(&self.provenance).expect("a plain struct serialises");
        let checksum = format!(
            "{:016x}",
            checksum(
                self.specs.iter().zip(&self.values).map(|(s, v)| (s.name.as_str(), v.as_slice()))
            )
        );
        let metadata =
            HashMap::from([(PROVENANCE.to_owned(), provenance), ("checksum".to_owned(), checksum)]);
        let write = |source| Error::Write { path: path.to_path_buf(), source };
        let file = safetensors::serialize(views, Some(metadata))
            .map_err(|error| write(std::io::Error::other(error.to_string())))?;
        let temporary = path.with_extension("tmp");
        let written = std::fs::write(&temporary, file)
            .and_then(|()| std::fs::File::open(&temporary)?.sync_all())
            .and_then(|()| std::fs::rename(&temporary, path));
        written.map_err(write)
    }

    /// Every parameter: its name, its shape, its values.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[usize], &[f32])> {
        let values = self.specs.iter().zip(&self.values);
        values.map(|(spec, values)| (spec.name.as_str(), spec.shape.as_slice(), values.as_slice()))
    }

    /// These with what was published of the same expert; a snapshot must have every value. They stay as they are where
    /// anything of it does not fit or is not finite.
    pub fn apply(&self, update: &ParameterUpdate<'_>) -> Result<Parameters, Error> {
        let refused =
            |why: String| Error::Published { plugin: self.provenance.plugin.clone(), why };
        let provenance: Provenance = serde_json::from_str(update.provenance)
            .map_err(|error| refused(format!("their provenance cannot be read: {error}")))?;
        let Provenance { plugin, graph, fm_version, .. } = &self.provenance;
        if (&provenance.plugin, &provenance.graph) != (plugin, graph) {
            let Provenance { plugin, plugin_version, .. } = &provenance;
            return Err(refused(format!(
                "they are of another network, of {plugin} {plugin_version}"
            )));
        }
        if provenance.fm_version != *fm_version {
            let theirs = &provenance.fm_version;
            return Err(refused(format!("they are for FM {theirs:?}, and not for {fm_version:?}")));
        }
        let mut new = Parameters { provenance, ..self.clone() };
        let mut count = 0;
        for block in update.pieces {
            let TensorSlice { name, shape, start, values } = block;
            let at = self.specs.iter().position(|spec| spec.name == *name && spec.shape == *shape);
            let end = start.checked_add(values.len());
            let place = at.zip(end).and_then(|(at, end)| new.values[at].get_mut(*start..end));
            let place = place.ok_or_else(|| {
                refused(format!("the network has no {} values of `{name}` {shape:?}", values.len()))
            })?;
            if values.iter().any(|value| !value.is_finite()) {
                return Err(refused(format!("`{name}` holds a value that is not finite")));
            }
            place.copy_from_slice(values);
            count += values.len();
        }
        if (update.is_whole && count != self.count()) || update.rows > 0 {
            return Err(refused(format!("they have {count} of {} values", self.count())));
        }
        Ok(new)
    }

    /// The number of values.
    pub fn count(&self) -> usize {
        self.values.iter().map(Vec::len).sum()
    }

    /// The values of parameter `index`, row-major.
    pub fn values(&self, index: usize) -> &[f32] {
        &self.values[index]
    }

    /// The values of parameter `index`, for an optimiser.
    pub fn values_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.values[index]
    }

    /// The values of the parameter called `name`.
    pub fn by_name(&self, name: &str) -> Option<&[f32]> {
        let index = self.specs.iter().position(|spec| spec.name == name)?;
        Some(&self.values[index])
    }

    /// Some rows of a table, one after the other.
    pub fn gather(&self, index: usize, rows: &[u32]) -> Vec<f32> {
        let width = self.specs[index].shape[1];
        let row = |row: &u32| &self.values[index][*row as usize * width..][..width];
        rows.iter().flat_map(row).copied().collect()
    }
}

impl SavedParameters {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<SavedParameters, Error> {
        let bytes = std::fs::read(path)
            .map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
        parse(&bytes, path).map_err(|why| Error::Parameters { path: path.to_path_buf(), why })
    }
}

/// [`Graph::hash`] as provenance keeps it.
pub fn hash_text(graph: &Graph) -> String {
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
    let provenance: Provenance = serde_json::from_str(provenance)
        .map_err(|error| format!("its provenance cannot be read: {error}"))?;
    let mut tensors = HashMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(format!("parameter `{name}` is {:?}, not f32", view.dtype()));
        }
        let values: Vec<f32> = view
            .data()
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(damaged(format!("parameter `{name}` holds a value that is not finite")));
        }
        tensors.insert(name, (view.shape().to_vec(), values));
    }
    let sum =
        checksum(tensors.iter().map(|(name, (_, values))| (name.as_str(), values.as_slice())));
    if metadata.get("checksum").map(String::as_str) != Some(format!("{sum:016x}").as_str()) {
        return Err(damaged("its checksum differs".into()));
    }
    Ok(SavedParameters { tensors, provenance, path: path.to_path_buf() })
}

/// Independent of the order of the parameters.
fn checksum<'a>(tensors: impl Iterator<Item = (&'a str, &'a [f32])>) -> u64 {
    let mix = |hash: u64, word: u64| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
    let one = |(name, values): (&str, &[f32])| {
        let start =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| mix(hash, u64::from(byte)));
        values.iter().fold(start, |hash, value| mix(hash, u64::from(value.to_bits())))
    };
    tensors.map(one).fold(0, u64::wrapping_add)
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn initial(spec: &ParameterSpec, seed: u64) -> Vec<f32> {
    let name = spec.name.bytes().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rng = SmallRng::seed_from_u64(name);
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
