//! A running average of the dense weights.
//!
//! The weights of a streaming trainer jump about with every batch. Their average
//! predicts better, and TAEs made with it drift slowly, which is what experts
//! need (section 3.2: robustness). It predicts, serves and is logged; the
//! gradients are always those of the weights themselves.

use std::collections::VecDeque;

use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{Tensor, TensorData, backend::Backend},
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

/// The weights in the order of a visit.
struct Values(VecDeque<TensorData>);

impl<B: Backend> ModuleVisitor<B> for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.push_back(param.val().into_data());
    }
}

struct Follow {
    values: VecDeque<TensorData>,
    decay: f64,
}

impl<B: Backend> ModuleMapper<B> for Follow {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let (id, old, mapper) = param.consume();
        let now = self.values.pop_front().expect("both networks are of one kind");
        let now = Tensor::<B, D>::from_data(now, &old.device());
        Param::from_mapped_value(id, old * self.decay + now * (1.0 - self.decay), mapper)
    }
}
