//! A saved training run: what the next step depends on besides its examples.
//!
//! A folder holds `training.json` (what the run is and how far it came),
//! `network.safetensors` (all dense weights), `moments.safetensors` (AdamW's
//! state) and `store/` (sparse rows with their Adagrad state). Randomness needs
//! no file: it is a function of the seed and the step. Where the run stands in
//! its stream is the host's to remember.

use std::{collections::BTreeMap, fs, path::Path};

use burn::{
    module::{Module, ModuleVisitor, Param},
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
    batch::Statistics,
    checkpoint::{Named, Tensors, failed, named, read_tensors, write_tensors},
    shard::Network,
    spec::{FmConfig, FmSpec},
};

/// The optimizer of the dense weights.
pub(crate) type Optimizer<A> = OptimizerAdaptor<AdamW, Network<A>, A>;

type Moments<A> = <Optimizer<A> as burn::optim::Optimizer<Network<A>, A>>::Record;

/// The file of all dense weights.
pub(crate) const NETWORK: &str = "network.safetensors";

/// The file of their running average, where there is one.
pub(crate) const AVERAGE: &str = "average.safetensors";

const MOMENTS: &str = "moments.safetensors";

/// The format of `training.json`; another one is refused.
const FORMAT: u32 = 1;

/// What `training.json` holds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct State {
    format: u32,
    config: FmConfig,
    spec: FmSpec,
    pub(crate) statistics: Statistics,
    pub(crate) steps: u64,
    pub(crate) requests: u64,
    pub(crate) trained_until_ms: i64,
    /// Threads that a batch is split over: sums are taken in their order.
    pub(crate) shards: usize,
    /// Steps that AdamW took of each weight; one that no gradient reached yet is missing.
    moment_steps: BTreeMap<String, usize>,
}

impl State {
    /// A run that has not begun.
    pub(crate) fn new(config: &FmConfig, spec: &FmSpec) -> Self {
        Self {
            format: FORMAT,
            config: config.clone(),
            spec: spec.clone(),
            statistics: Statistics::new(spec),
            steps: 0,
            requests: 0,
            trained_until_ms: 0,
            shards: 1,
            moment_steps: BTreeMap::new(),
        }
    }

    /// Writes the state and the optimizer's moments.
    pub(crate) fn write<A: AutodiffBackend>(
        mut self,
        dir: &Path,
        network: &Network<A>,
        moments: Moments<A>,
    ) -> Result<()> {
        let mut writer =
            MomentWriter { path: Vec::new(), moments, steps: BTreeMap::new(), all: Vec::new() };
        network.visit(&mut writer);
        self.moment_steps = writer.steps;
        write_tensors(&writer.all, &dir.join(MOMENTS))?;
        let path = dir.join("training.json");
        let value = serde_json::to_value(&self).map_err(|error| failed(&path, error))?;
        let text =
            serde_json::to_vec_pretty(&spell(value)).map_err(|error| failed(&path, error))?;
        fs::write(&path, text).map_err(|error| failed(&path, error))
    }

    /// Reads `training.json`.
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        let path = dir.join("training.json");
        let text = fs::read(&path).map_err(|error| {
            failed(&path, format!("{error}; there is no saved run to resume, train without it"))
        })?;
        let value: Value = serde_json::from_slice(&text).map_err(|error| failed(&path, error))?;
        if value.get("format") != Some(&Value::from(FORMAT)) {
            return Err(failed(&path, format!("not of format {FORMAT}; start the training anew")));
        }
        serde_json::from_value(unspell(value)).map_err(|error| failed(&path, error))
    }

    /// Refuses to go on with another configuration or other data. How often a run is saved may change.
    pub(crate) fn check(&self, dir: &Path, config: &FmConfig, spec: &FmSpec) -> Result<()> {
        let saves =
            FmConfig { save_every_requests: config.save_every_requests, ..self.config.clone() };
        let said = differing(&saves, config)
            .map(|(key, saved, now)| format!("fm.{key} was {saved} and is {now} now"));
        let said = said.or_else(|| {
            differing(&self.spec, spec)
                .map(|(key, saved, now)| format!("the data's {key} were {saved} and are {now} now"))
        });
        match said {
            Some(said) => Err(failed(
                dir,
                format!("{said}; a run is resumed as it was begun: put it back, or start anew"),
            )),
            None => Ok(()),
        }
    }

    /// Gives an optimizer the moments of the weights of `network`.
    pub(crate) fn load_moments<A: AutodiffBackend>(
        &self,
        dir: &Path,
        network: &Network<A>,
        optimizer: Optimizer<A>,
    ) -> Result<Optimizer<A>> {
        let path = dir.join(MOMENTS);
        let mut reader = MomentReader::<A> {
            path: Vec::new(),
            steps: &self.moment_steps,
            tensors: read_tensors(&path)?,
            moments: optimizer.to_record(),
            fault: None,
        };
        network.visit(&mut reader);
        match reader.fault {
            Some(name) => Err(failed(&path, format!("{name} is missing or of another shape"))),
            None => Ok(optimizer.load_record(reader.moments)),
        }
    }
}

/// The first key whose values differ, with both.
fn differing<T: Serialize>(saved: &T, now: &T) -> Option<(String, Value, Value)> {
    let fields = |of: &T| match serde_json::to_value(of) {
        Ok(Value::Object(fields)) => fields,
        _ => unreachable!("a struct of plain values is a JSON object"),
    };
    let (saved, now) = (fields(saved), fields(now));
    saved.into_iter().find_map(|(key, saved)| {
        let now = now.get(&key)?.clone();
        (saved != now).then_some((key, saved, now))
    })
}

/// Numbers with a fraction as `{"f64": "0.1"}`: the JSON parser may miss their last bit, Rust's own
/// does not.
fn spell(value: Value) -> Value {
    match value {
        Value::Number(number) if number.is_f64() => {
            let text = format!("{:?}", number.as_f64().expect("asked above"));
            Value::Object([("f64".to_string(), Value::String(text))].into_iter().collect())
        }
        Value::Array(values) => Value::Array(values.into_iter().map(spell).collect()),
        Value::Object(fields) => {
            Value::Object(fields.into_iter().map(|(key, value)| (key, spell(value))).collect())
        }
        other => other,
    }
}

fn unspell(value: Value) -> Value {
    match value {
        Value::Array(values) => Value::Array(values.into_iter().map(unspell).collect()),
        Value::Object(fields) => {
            if let (1, Some(Value::String(text))) = (fields.len(), fields.get("f64"))
                && let Ok(number) = text.parse::<f64>()
            {
                return Value::from(number);
            }
            Value::Object(fields.into_iter().map(|(key, value)| (key, unspell(value))).collect())
        }
        other => other,
    }
}

struct MomentWriter<A: AutodiffBackend> {
    path: Vec<String>,
    moments: Moments<A>,
    steps: BTreeMap<String, usize>,
    all: Vec<Named>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for MomentWriter<A> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        let Some(record) = self.moments.remove(&param.id) else { return };
        let AdamWState { momentum } = record.into_state::<D>();
        let name = self.path.join(".");
        self.all.push(named(format!("{name}.moment_1"), momentum.moment_1.into_data()));
        self.all.push(named(format!("{name}.moment_2"), momentum.moment_2.into_data()));
        self.steps.insert(name, momentum.time);
    }
}

struct MomentReader<'a, A: AutodiffBackend> {
    path: Vec<String>,
    steps: &'a BTreeMap<String, usize>,
    tensors: Tensors,
    moments: Moments<A>,
    fault: Option<String>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for MomentReader<'_, A> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.into());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        let name = self.path.join(".");
        let Some(&time) = self.steps.get(&name) else { return };
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
        if let (Some(moment_1), Some(moment_2)) = (moment("moment_1"), moment("moment_2")) {
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
    fn spelled_numbers_come_back_bit_for_bit() {
        let numbers: Vec<f64> =
            (1..2000).map(|i| f64::from(i).sqrt().ln() / 3.0 * 10f64.powi(i % 40 - 20)).collect();
        let value = serde_json::json!({ "a": numbers, "b": [1, "x", null], "c": { "d": 0.1 } });
        let text = serde_json::to_string(&spell(value.clone())).unwrap();
        assert_eq!(unspell(serde_json::from_str(&text).unwrap()), value);
    }

    #[test]
    fn the_first_difference_is_named() {
        let config = FmConfig::default();
        let other = FmConfig { layers: 5, ..config.clone() };
        assert!(differing(&config, &config.clone()).is_none());
        let (key, saved, now) = differing(&config, &other).unwrap();
        assert_eq!((key.as_str(), saved, now), ("layers", Value::from(2), Value::from(5)));
    }
}
