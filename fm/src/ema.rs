//! An exponential moving average (EMA) of the dense weights.
//!
//! The weights of a streaming trainer fluctuate with every batch. Their average predicts better,
//! and its TAEs drift slowly, which experts need (section 3.2: robustness). The average makes the
//! predictions, the logged TAEs and the checkpoints; gradients are taken at the weights themselves.
//!
//! A weight that is new forgets its first values sooner, by its own age and not by the model's: the
//! average of a task that was added would else stay near zero for hundreds of steps.

use std::path::Path;

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, TensorData, backend::Backend},
};
use hypercast_kernels::attention::tensor;

use crate::{
    Result,
    checkpoint::{
        ModuleWeight, TensorMap, load_weights, read_tensors, save_weights, weights_of,
        write_tensors,
    },
    growth::SpecGrowth,
    shard::FmNetwork,
    update::WeightTensor,
};

/// The file with the average of a saved run.
const AVERAGE_FILE: &str = "average.safetensors";

/// The file with the steps in which weights were new, if there are any that are not old by now.
const BIRTHS_FILE: &str = "average_births.safetensors";

/// A moving average of a network's weights.
pub(crate) struct WeightAverage<B: Backend> {
    pub(crate) network: FmNetwork<B>,
    decay: f64,
    /// Of tensors that have grown lately: the step before which each weight did not exist.
    births: TensorMap,
}

/// How a saved average is taken over.
#[derive(Clone, Copy)]
pub(crate) struct SavedAverage<'a> {
    /// The folder of the saved run.
    pub(crate) dir: &'a Path,
    pub(crate) growth: Option<&'a SpecGrowth>,
    pub(crate) embedding_dim: usize,
    /// The step at which the run was saved.
    pub(crate) step: u64,
}

impl<B: Backend> WeightAverage<B> {
    /// Begins at the weights of a network. `decay` is what is left of the average in a step.
    pub(crate) fn new(network: FmNetwork<B>, decay: f64) -> Self {
        Self { network, decay, births: TensorMap::new() }
    }

    /// Reads what a run has saved, for a new average of the same network.
    pub(crate) fn load(self, saved: SavedAverage<'_>) -> Result<Self> {
        let SavedAverage { dir, growth, embedding_dim, step } = saved;
        let (path, births) = (dir.join(AVERAGE_FILE), dir.join(BIRTHS_FILE));
        let network = load_weights(self.network, &path, growth, embedding_dim)?;
        let mut births =
            if births.exists() { read_tensors(&births)? } else { TensorMap::default() };
        if let Some(growth) = growth {
            let of_tensor = |(name, (shape, values)): (String, (Vec<usize>, Vec<f32>))| {
                let old = births.remove(&name).unwrap_or((shape, vec![0.0; values.len()]));
                (name, old)
            };
            let old = read_tensors(&path)?.into_iter().map(of_tensor).collect();
            let like = WeightTensor::of(&network);
            births = growth.grown(embedding_dim, old, like, |new, _| vec![step as f32; new.len()]);
        }
        Ok(Self { network, births, ..self })
    }

    /// Writes it into the folder of a saved run.
    pub(crate) fn save(&self, dir: &Path) -> Result<()> {
        save_weights(&self.network, &dir.join(AVERAGE_FILE))?;
        if self.births.is_empty() {
            return Ok(());
        }
        let tensor = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            let (name, shape, values) = (name.clone(), shape.clone(), values.clone());
            WeightTensor { name, shape, values }
        };
        write_tensors(self.births.iter().map(tensor).collect(), &dir.join(BIRTHS_FILE))
    }

    /// Moves one step towards `now`: `decay` of the old value plus `1 - decay` of the new. The
    /// decay is smaller in the first steps of a weight, so that its initial value is forgotten.
    pub(crate) fn update(self, now: &FmNetwork<B>, step: u64) -> Self {
        let Self { network, decay, mut births } = self;
        let is_young = |birth: &f32| decay_at(decay, step, *birth) < decay;
        births.retain(|_, (_, births)| births.iter().any(is_young));
        let now = weights_of(now).into_iter();
        let network = network.map(&mut EmaMapper { now, decay, step, births: &births });
        Self { network, decay, births }
    }
}

/// The decay for a weight that was new before the step `birth`.
fn decay_at(decay: f64, step: u64, birth: f32) -> f64 {
    let age = (step as f64 - f64::from(birth)).max(0.0);
    decay.min((1.0 + age) / (10.0 + age))
}

struct EmaMapper<'a, B: Backend> {
    now: std::vec::IntoIter<ModuleWeight<B>>,
    decay: f64,
    step: u64,
    births: &'a TensorMap,
}

impl<B: Backend> ModuleMapper<B> for EmaMapper<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let now = self.now.next().expect("both networks have the same structure");
        let births = self.births.get(&now.name);
        let now = tensor::<B, D>(now.value);
        let moved = match births {
            None => {
                let decay = decay_at(self.decay, self.step, 0.0);
                old * decay + now * (1.0 - decay)
            }
            Some((shape, births)) => {
                let change = |birth: &f32| (1.0 - decay_at(self.decay, self.step, *birth)) as f32;
                let changes = TensorData::new(births.iter().map(change).collect(), shape.clone());
                let changes = Tensor::<B, D>::from_data(changes, &old.device());
                old.clone() + (now - old) * changes
            }
        };
        Param::from_mapped_value(id, moved, mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        alignment::AlignmentModules,
        model::FmModel,
        spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
        update::WeightTensor,
    };
    use burn_flex::Flex;

    fn network(seed: u64) -> FmNetwork<Flex> {
        let device = Default::default();
        Flex::seed(&device, seed);
        let config = FmConfig { dim: 8, heads: 1, embedding_dim: 4, ..FmConfig::default() };
        let task = TaskSpec {
            name: "click".into(),
            main: true,
            label: TaskLabel::Action(0),
            transform: Default::default(),
            surfaces: vec![true],
            weight: 1.0,
        };
        let spec = FmSpec {
            surfaces: vec!["home".into()],
            actions: 1,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            item_optional: Vec::new(),
            features: 2,
            profile_ids: vec![],
            id_widths: Default::default(),
            content: 0,
            training_only: Default::default(),
            alignments: Default::default(),
            tasks: vec![task],
        };
        FmNetwork {
            model: FmModel::new(&config, &spec, &device),
            alignments: AlignmentModules::new(&config, &spec, &device),
        }
    }

    fn numbers(network: &FmNetwork<Flex>) -> Vec<f32> {
        WeightTensor::of(network).into_iter().flat_map(|weight| weight.values).collect()
    }

    #[test]
    fn an_update_moves_by_the_decay_and_faster_at_first() {
        let (from, to) = (network(1), network(2));
        let (a, b) = (numbers(&from), numbers(&to));
        assert!(a != b);
        for (step, decay) in [(100_000, 0.75), (0, 0.1)] {
            let moved = numbers(&WeightAverage::new(from.clone(), 0.75).update(&to, step).network);
            for ((a, b), moved) in a.iter().zip(&b).zip(&moved) {
                assert!((decay * a + (1.0 - decay) * b - moved).abs() < 1e-6, "step {step}");
            }
        }
    }

    #[test]
    fn a_weight_that_is_new_forgets_sooner_than_old_ones_until_it_is_old() {
        let (from, to) = (network(1), network(2));
        let (a, b) = (numbers(&from), numbers(&to));
        let WeightTensor { name, shape, values } = WeightTensor::of(&from).remove(0);
        let mut births = vec![0.0; values.len()];
        births[0] = 100_000.0;
        let mut average = WeightAverage::new(from, 0.75);
        average.births.insert(name, (shape, births));
        let average = average.update(&to, 100_000);
        let moved = numbers(&average.network);
        for (at, decay) in [(0, 0.1), (1, 0.75), (a.len() - 1, 0.75)] {
            assert!((decay * a[at] + (1.0 - decay) * b[at] - moved[at]).abs() < 1e-6, "{at}");
        }
        assert!(!average.births.is_empty());
        assert!(average.update(&to, 100_100).births.is_empty());
    }
}
