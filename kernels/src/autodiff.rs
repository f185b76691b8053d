//! The op under autodiff: one node whose backward is the inner backend's.
//!
//! Only the inputs are kept; the backward computes the scores again, so that
//! no memory grows with the square of the sequence.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, TensorMetadata};

use crate::attention::{HstuAttention, HstuBackend, HstuInputs};

#[derive(Debug)]
struct HstuBackward;

#[derive(Debug, Clone)]
struct Saved {
    inputs: HstuInputs<NodeId>,
    shape: Arc<HstuAttention>,
}

impl<B: HstuBackend> Backward<B, 5> for HstuBackward {
    type State = Saved;

    fn backward(self, ops: Ops<Saved, 5>, grads: &mut Gradients, checkpointer: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let Saved { inputs, shape } = ops.state;
        let inputs = inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let found = B::hstu_attention_backward(inputs, grad, shape);
        let found = [Some(found.q), Some(found.k), Some(found.v), found.position, found.time];
        for (parent, grad) in ops.parents.into_iter().zip(found) {
            // An untracked parent is None, and so is the gradient of an absent table.
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

impl<B: HstuBackend, C: CheckpointStrategy> HstuBackend for Autodiff<B, C> {
    fn hstu_attention(
        inputs: HstuInputs<FloatTensor<Self>>,
        shape: Arc<HstuAttention>,
    ) -> FloatTensor<Self> {
        // The node has five parents always: an untracked placeholder stands for an absent table.
        let placeholder = || {
            let (device, dtype) = (B::float_device(&inputs.q.primitive), inputs.q.dtype());
            Self::from_inner(B::float_zeros(Shape::new([1]), &device, dtype.into()))
        };
        let node = |table: &Option<FloatTensor<Self>>| match table {
            Some(table) => table.node.clone(),
            None => placeholder().node,
        };
        let parents = [
            inputs.q.node.clone(),
            inputs.k.node.clone(),
            inputs.v.node.clone(),
            node(&inputs.position),
            node(&inputs.time),
        ];
        match HstuBackward.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = inputs.as_ref().map(|tensor| prep.checkpoint(tensor));
                let inner = inputs.map(|tensor| tensor.primitive);
                let saved = Saved { inputs: ids, shape: shape.clone() };
                prep.finish(saved, B::hstu_attention(inner, shape))
            }
            OpsKind::UnTracked(prep) => {
                prep.finish(B::hstu_attention(inputs.map(|tensor| tensor.primitive), shape))
            }
        }
    }

    /// # Panics
    /// Always: the op has no second derivative.
    fn hstu_attention_backward(
        _inputs: HstuInputs<FloatTensor<Self>>,
        _grad: FloatTensor<Self>,
        _shape: Arc<HstuAttention>,
    ) -> HstuInputs<FloatTensor<Self>> {
        panic!(
            "HSTU attention has no second derivative: differentiate it once, on a backend that is not Autodiff<Autodiff<_>>"
        )
    }
}
