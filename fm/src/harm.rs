//! What a model must not learn from: numbers that are not finite, and losses far beyond the usual.
//!
//! A single label of 3e38 makes the loss infinite and all weights NaN; one of 1e15 keeps the loss
//! finite, and its gradient stops the rows that it reaches for good. Trainers, of the FM and of
//! experts, set such examples aside; this module only recognises them.

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{ElementConversion as _, Tensor, backend::AutodiffBackend},
};

use crate::shard::{FmNetwork, ShardResult};

/// What is wrong with an example that is set aside.
pub const HARMFUL: &str = "learning from it would harm the model: its loss or a gradient is not \
                           finite, or its loss is a thousand times the usual one";

/// A loss is unusual from so many times the mean on.
const UNUSUAL_LOSS: f64 = 1000.0;

/// Steps before the mean loss says what is usual.
const WARM_STEPS: u64 = 20;

/// How much a step moves the mean loss.
const MEAN_LOSS_RATE: f64 = 0.05;

/// The loss of all shards.
pub(crate) fn loss(passes: &[ShardResult]) -> f32 {
    passes.iter().map(|pass| pass.gradients.loss).sum()
}

/// Whether a loss is far beyond the mean one of earlier steps.
pub fn is_unusual(loss: f64, mean: f64, steps: u64) -> bool {
    steps >= WARM_STEPS && mean > 0.0 && loss > mean * UNUSUAL_LOSS
}

/// The mean loss after a step; it is 0 before the first one. A step without a label has no loss to
/// count.
pub fn moved_mean(mean: f64, loss: f64) -> f64 {
    if mean == 0.0 || loss == 0.0 { mean.max(loss) } else { mean + (loss - mean) * MEAN_LOSS_RATE }
}

/// Whether the loss and all gradients are finite.
pub(crate) fn is_finite<A: AutodiffBackend>(
    network: &FmNetwork<A>,
    passes: &[ShardResult],
) -> bool {
    let has_finite_gradients = |ShardResult { gradients, .. }: &ShardResult| {
        let mut sum = GradientSum::<A> { gradients: &gradients.dense, sum: None };
        network.visit(&mut sum);
        sum.sum.is_none_or(|sum| sum.into_scalar().elem::<f32>().is_finite())
            && gradients.row_gradients.iter().all(|gradient| gradient.is_finite())
    };
    loss(passes).is_finite() && passes.iter().all(has_finite_gradients)
}

/// The sum of the gradients of all weights. One that is not finite makes the sum so, which is one
/// number to read from a device.
struct GradientSum<'a, A: AutodiffBackend> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<A::InnerBackend, 1>>,
}

impl<A: AutodiffBackend> ModuleVisitor<A> for GradientSum<'_, A> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<A, D>>) {
        if let Some(gradient) = self.gradients.get::<A::InnerBackend, D>(param.id) {
            let own = gradient.sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + own,
                None => own,
            });
        }
    }
}
