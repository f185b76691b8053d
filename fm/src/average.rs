//! A running average of the dense weights.
//!
//! The weights of a streaming trainer jump about with every batch. Their average
//! predicts better, and TAEs made with it drift slowly, which is what experts
//! need (section 3.2: robustness). It predicts, serves and is logged; the
//! gradients are always those of the weights themselves.

use std::collections::VecDeque;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Tensor, TensorPrimitive, backend::Backend},
};

use crate::shard::Network;

/// `average` a step further towards `now`: `decay` of the old, the rest of the new. The first steps
/// weigh more, so that an average does not remember how the weights began.
pub(crate) fn follow<B: Backend>(
    average: Network<B>,
    now: &Network<B>,
    decay: f64,
    step: u64,
) -> Network<B> {
    let mut values = Values(VecDeque::new());
    now.visit(&mut values);
    let decay = decay.min((1 + step) as f64 / (10 + step) as f64);
    average.map(&mut Follow { values: values.0, decay })
}

/// The weights in the order of a visit, where they are: nothing is copied.
struct Values<B: Backend>(VecDeque<B::FloatTensorPrimitive>);

impl<B: Backend> ModuleVisitor<B> for Values<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.push_back(param.val().into_primitive().tensor());
    }
}

struct Follow<B: Backend> {
    values: VecDeque<B::FloatTensorPrimitive>,
    decay: f64,
}

impl<B: Backend> ModuleMapper<B> for Follow<B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let now = self.values.pop_front().expect("both networks are of one kind");
        let now = Tensor::<B, D>::from_primitive(TensorPrimitive::Float(now));
        Param::from_mapped_value(id, old * self.decay + now * (1.0 - self.decay), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        alignment::Alignments,
        model::FmModel,
        spec::{FmConfig, FmSpec, Label, TaskSpec},
    };
    use burn_flex::Flex;

    fn network(seed: u64) -> Network<Flex> {
        let device = Default::default();
        Flex::seed(&device, seed);
        let config = FmConfig { dim: 8, heads: 1, embedding_dim: 4, ..FmConfig::default() };
        let task = TaskSpec {
            name: "click".into(),
            main: true,
            label: Label::Action(0),
            surfaces: vec![true],
            weight: 1.0,
        };
        let spec = FmSpec {
            surfaces: vec!["home".into()],
            actions: 1,
            values: 0,
            item_ids: 0,
            item_dense: 0,
            features: 2,
            profile_ids: vec![],
            content: 0,
            tasks: vec![task],
        };
        Network {
            model: FmModel::new(&config, &spec, &device),
            alignments: Alignments::new(&config, &spec, &device),
        }
    }

    fn numbers(network: &Network<Flex>) -> Vec<f32> {
        let mut values = Values(VecDeque::new());
        network.visit(&mut values);
        let tensor = |value| Tensor::<Flex, 1>::from_primitive(TensorPrimitive::Float(value));
        let numbers = |value| tensor(value).into_data().into_vec::<f32>().unwrap();
        values.0.into_iter().flat_map(numbers).collect()
    }

    #[test]
    fn it_goes_its_share_of_the_way_and_faster_at_first() {
        let (from, to) = (network(1), network(2));
        let (a, b) = (numbers(&from), numbers(&to));
        assert!(a != b);
        for (step, decay) in [(100_000, 0.75), (0, 0.1)] {
            let moved = numbers(&follow(from.clone(), &to, 0.75, step));
            for ((a, b), moved) in a.iter().zip(&b).zip(&moved) {
                assert!((decay * a + (1.0 - decay) * b - moved).abs() < 1e-6, "step {step}");
            }
        }
    }
}
