//! An exponential moving average (EMA) of the dense weights.
//!
//! The weights of a streaming trainer fluctuate with every batch. Their average predicts better,
//! and its TAEs drift slowly, which experts need (section 3.2: robustness). The average makes the
//! predictions, the logged TAEs and the checkpoints; gradients are taken at the weights themselves.

use burn::{
    module::{Module, ModuleMapper, Param},
    tensor::{Tensor, backend::Backend},
};
use hypercast_kernels::attention::tensor;

use crate::{
    checkpoint::{ModuleWeight, weights_of},
    shard::FmNetwork,
};

/// Moves `average` one step towards `now`: `decay` of the old value plus `1 - decay` of the new.
/// The decay is smaller in the first steps, so that the initial weights are forgotten.
pub(crate) fn update<B: Backend>(
    average: FmNetwork<B>,
    now: &FmNetwork<B>,
    decay: f64,
    step: u64,
) -> FmNetwork<B> {
    let decay = decay.min((1 + step) as f64 / (10 + step) as f64);
    average.map(&mut EmaMapper { now: weights_of(now).into_iter(), decay })
}

struct EmaMapper<B: Backend> {
    now: std::vec::IntoIter<ModuleWeight<B>>,
    decay: f64,
}

impl<B: Backend> ModuleMapper<B> for EmaMapper<B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let now = self.now.next().expect("both networks have the same structure");
        let now = tensor::<B, D>(now.value);
        Param::from_mapped_value(id, old * self.decay + now * (1.0 - self.decay), mapper)
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
            let moved = numbers(&update(from.clone(), &to, 0.75, step));
            for ((a, b), moved) in a.iter().zip(&b).zip(&moved) {
                assert!((decay * a + (1.0 - decay) * b - moved).abs() < 1e-6, "step {step}");
            }
        }
    }
}
