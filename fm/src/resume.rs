//! A saved training run: everything that the next step depends on besides its examples.
//!
//! The folder contains `training.json` (settings and progress), `network.safetensors` (all dense
//! weights), `average.safetensors` (their moving average, if there is one, with
//! `average_births.safetensors` beside it for a while after data has grown), `moments.safetensors`
//! (AdamW's state) and `store/` (sparse rows with their Adagrad state). Random choices need no
//! file, since they are functions of the seed and the step. The caller records the run's position
//! in its stream.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::{
        AdamW, AdamWState, AdaptiveMomentumState, Optimizer as _, adaptor::OptimizerAdaptor,
        record::AdaptorRecord,
    },
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Result,
    batch::ColumnStatistics,
    checkpoint::{
        FORMAT, TensorMap, check_format, checkpoint_error, names_of, read_json, read_tensors,
        stored_config, write_json, write_tensors,
    },
    growth::SpecGrowth,
    shard::FmNetwork,
    spec::{FmConfig, FmSpec},
    update::WeightTensor,
};

/// The optimizer of the dense weights.
pub(crate) type DenseOptimizer<A> = OptimizerAdaptor<AdamW, FmNetwork<A>, A>;

type MomentRecords<A> = <DenseOptimizer<A> as burn::optim::Optimizer<FmNetwork<A>, A>>::Record;

/// The file with all dense weights.
pub(crate) const NETWORK_FILE: &str = "network.safetensors";

/// The file with AdamW's moments.
const MOMENTS_FILE: &str = "moments.safetensors";

/// AdamW's moments of a weight, as the endings of their names.
pub(crate) const MOMENTS: [&str; 2] = ["moment_1", "moment_2"];

/// The content of `training.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TrainingState {
    /// As that of checkpoints; a run that is resumed keeps its own.
    pub(crate) format: u32,
    #[serde(deserialize_with = "stored_config")]
    pub(crate) config: FmConfig,
    pub(crate) spec: FmSpec,
    pub(crate) statistics: ColumnStatistics,
    pub(crate) steps: u64,
    pub(crate) requests: u64,
    pub(crate) trained_until_ms: i64,
    /// A moving average of the loss; 0 before the first step, and in runs of before it was kept.
    #[serde(default)]
    pub(crate) mean_loss: f64,
    /// The number of threads that a batch is split over, which fixes the order of sums.
    pub(crate) shards: usize,
    /// As that of checkpoints.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) field_numbers: Vec<u8>,
    /// Tasks that were added lately to those that the model had learned, with the labels that it
    /// has seen of each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) added_tasks: BTreeMap<String, u64>,
    /// By surface whose alignment module began anew lately: what that predicts, with the labels of
    /// the surface that it has seen of each.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) realigned_tasks: BTreeMap<String, BTreeMap<String, u64>>,
    /// AdamW's step count of each weight; a weight without a gradient so far is missing.
    pub(crate) moment_steps: BTreeMap<String, usize>,
}

impl TrainingState {
    /// The state of a run before its first step.
    pub(crate) fn new(config: &FmConfig, spec: &FmSpec, shards: usize) -> Self {
        Self {
            format: FORMAT,
            config: config.clone(),
            spec: spec.clone(),
            statistics: ColumnStatistics::new(spec),
            steps: 0,
            requests: 0,
            trained_until_ms: 0,
            mean_loss: 0.0,
            shards,
            field_numbers: Vec::new(),
            added_tasks: BTreeMap::new(),
            realigned_tasks: BTreeMap::new(),
            moment_steps: BTreeMap::new(),
        }
    }

    /// Writes the state and the optimizer's moments.
    pub(crate) fn write<A: AutodiffBackend>(
        mut self,
        dir: &Path,
        network: &FmNetwork<A>,
        moments: MomentRecords<A>,
    ) -> Result<()> {
        let (steps, all) = (BTreeMap::new(), Vec::new());
        let mut writer = MomentWriter { names: names_of(network), moments, steps, all };
        network.visit(&mut writer);
        self.moment_steps = writer.steps;
        write_tensors(writer.all, &dir.join(MOMENTS_FILE))?;
        let path = dir.join("training.json");
        let value = serde_json::to_value(&self).map_err(|error| checkpoint_error(&path, error))?;
        write_json(&encode_floats(value), &path)
    }

    /// Reads `training.json` of a saved trainer.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("training.json");
        let value: Value = read_json(&path, "there is no saved run to resume, start a new run")?;
        let format = value.get("format").and_then(Value::as_u64).unwrap_or_default();
        check_format(u32::try_from(format).unwrap_or(u32::MAX), &path)?;
        serde_json::from_value(decode_floats(value)).map_err(|error| checkpoint_error(&path, error))
    }

    /// The configuration to resume a run with that is asked to go on with `config`.
    ///
    /// # Errors
    /// Another configuration or specification than the run began with. Only `save_every_requests`
    /// may change.
    pub(crate) fn check(&self, dir: &Path, config: &FmConfig, spec: &FmSpec) -> Result<FmConfig> {
        let saved_config =
            FmConfig { save_every_requests: config.save_every_requests, ..self.config.clone() };
        let history_anchors = config.history_anchors.or(saved_config.history_anchors);
        let config = FmConfig { history_anchors, ..config.clone() };
        let difference = first_difference(&saved_config, &config)
            .map(|(key, saved, now)| format!("fm.{key} was {saved} and is {now} now"));
        let difference = difference.or_else(|| {
            first_difference(&self.spec, spec)
                .map(|(key, saved, now)| format!("the data's {key} were {saved} and are {now} now"))
        });
        match difference {
            Some(difference) => Err(checkpoint_error(
                dir,
                format!(
                    "{difference}; a run can only be resumed with its own settings: \
                     restore the old value, or start a new run"
                ),
            )),
            None => Ok(config),
        }
    }

    /// Loads the moments of `network`'s weights into an optimizer.
    pub(crate) fn load_moments<A: AutodiffBackend>(
        &self,
        dir: &Path,
        network: &FmNetwork<A>,
        optimizer: DenseOptimizer<A>,
        growth: Option<&SpecGrowth>,
    ) -> Result<DenseOptimizer<A>> {
        let path = dir.join(MOMENTS_FILE);
        let mut tensors = read_tensors(&path)?;
        if let Some(growth) = growth {
            tensors = growth.moments(self.config.embedding_dim, tensors, WeightTensor::of(network));
        }
        let mut reader = MomentReader::<A> {
            names: names_of(network),
            steps: &self.moment_steps,
            tensors,
            moments: optimizer.to_record(),
            fault: None,
        };
        network.visit(&mut reader);
        match reader.fault {
            Some(name) => {
                Err(checkpoint_error(&path, format!("{name} is missing or has another shape")))
            }
            None => Ok(optimizer.load_record(reader.moments)),
        }
    }
}

/// The first key whose values differ, with the saved and the current value.
fn first_difference<T: Serialize>(saved: &T, now: &T) -> Option<(String, Value, Value)> {
    let fields = |of: &T| match serde_json::to_value(of) {
        Ok(Value::Object(fields)) => fields,
        _ => unreachable!("a struct of plain values is a JSON object"),
    };
    let (mut saved, now) = (fields(saved), fields(now));
    // What is empty may have been left out.
    now.keys().for_each(|key| _ = saved.entry(key).or_insert(Value::Null));
    saved.into_iter().find_map(|(key, saved)| {
        let now = now.get(&key).cloned().unwrap_or_default();
        (saved != now).then_some((key, saved, now))
    })
}

/// Writes floating-point numbers as `{"f64": "0.1"}`, because the JSON parser may round the last
/// bit of a number and Rust's own parser does not.
fn encode_floats(value: Value) -> Value {
    rewrite(value, |value| {
        let number = value.as_f64().filter(|_| value.is_f64())?;
        Some(serde_json::json!({ "f64": format!("{number:?}") }))
    })
}

/// The inverse of [`encode_floats`].
fn decode_floats(value: Value) -> Value {
    rewrite(value, |value| {
        let fields = value.as_object().filter(|fields| fields.len() == 1)?;
        fields.get("f64")?.as_str()?.parse::<f64>().ok().map(Value::from)
    })
}

/// Replaces each value within `value` for which `change` has another one.
fn rewrite(value: Value, change: fn(&Value) -> Option<Value>) -> Value {
    if let Some(changed) = change(&value) {
        return changed;
    }
    let rewrite = |value| rewrite(value, change);
    match value {
        Value::Array(values) => Value::Array(values.into_iter().map(rewrite).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(key, value)| (key, rewrite(value))).collect())
        }
        other => other,
    }
}

struct MomentWriter<A: AutodiffBackend> {
    names: HashMap<ParamId, String>,
    moments: MomentRecords<A>,
    steps: BTreeMap<String, usize>,
    all: Vec<WeightTensor>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for MomentWriter<A> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        let Some(record) = self.moments.remove(&param.id) else { return };
        let AdamWState { momentum } = record.into_state::<D>();
        let name = &self.names[&param.id];
        for (which, moment) in MOMENTS.into_iter().zip([momentum.moment_1, momentum.moment_2]) {
            self.all.push(WeightTensor::new(format!("{name}.{which}"), moment.into_data()));
        }
        self.steps.insert(name.clone(), momentum.time);
    }
}

struct MomentReader<'a, A: AutodiffBackend> {
    names: HashMap<ParamId, String>,
    steps: &'a BTreeMap<String, usize>,
    tensors: TensorMap,
    moments: MomentRecords<A>,
    fault: Option<String>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for MomentReader<'_, A> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        let name = &self.names[&param.id];
        let Some(&time) = self.steps.get(name) else { return };
        let (shape, device) = (param.val().dims(), param.val().device());
        let mut moment = |which: &str| -> Option<Tensor<A::InnerBackend, D>> {
            let name = format!("{name}.{which}");
            match self.tensors.remove(&name) {
                Some((found, values)) if found == shape => {
                    Some(Tensor::from_data(TensorData::new(values, shape), &device))
                }
                _ => {
                    self.fault.get_or_insert(name);
                    None
                }
            }
        };
        let [first, second] = MOMENTS;
        if let (Some(moment_1), Some(moment_2)) = (moment(first), moment(second)) {
            let momentum = AdaptiveMomentumState { time, moment_1, moment_2, max_moment_2: None };
            let record = AdaptorRecord::from_state::<D>(AdamWState { momentum });
            self.moments.insert(param.id, record);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encoded_floats_come_back_bit_for_bit() {
        let numbers: Vec<f64> =
            (1..2000).map(|i| f64::from(i).sqrt().ln() / 3.0 * 10f64.powi(i % 40 - 20)).collect();
        let value = serde_json::json!({ "a": numbers, "b": [1, "x", null], "c": { "d": 0.1 } });
        let text = serde_json::to_string(&encode_floats(value.clone())).unwrap();
        assert_eq!(decode_floats(serde_json::from_str(&text).unwrap()), value);
    }

    #[test]
    fn the_first_difference_is_named() {
        let config = FmConfig::default();
        let other = FmConfig { layers: 5, ..config.clone() };
        assert!(first_difference(&config, &config.clone()).is_none());
        let (key, saved, now) = first_difference(&config, &other).unwrap();
        assert_eq!((key.as_str(), saved, now), ("layers", Value::from(2), Value::from(5)));
    }
}
