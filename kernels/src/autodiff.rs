//! The ops under autodiff: each is one node of the graph, whose backward is the inner backend's.
//!
//! A node keeps its inputs. The backward computes the scores again, so memory does not grow with
//! the square of the sequence length.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::tensor::backend::{AutodiffBackend, Backend};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, TensorMetadata};

use crate::attention::{HstuAttention, HstuBackend, HstuInputs};
use crate::embedding_bag::EmbeddingBags;
use crate::layer::{self, FusedLayer, LayerInputs, LayerOptions, LayerOutput};
use crate::mlp::{self, FusedMlp, MlpInputs};
use crate::pairs::{self, PairInputs, PairSum};

#[derive(Debug)]
struct HstuBackward;

#[derive(Debug, Clone)]
struct SavedAttention {
    inputs: HstuInputs<NodeId>,
    shape: Arc<HstuAttention>,
}

impl<B: HstuBackend> Backward<B, 5> for HstuBackward {
    type State = SavedAttention;

    fn backward(
        self,
        ops: Ops<SavedAttention, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let SavedAttention { inputs, shape } = ops.state;
        let inputs = inputs.map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let found = B::hstu_attention_backward(inputs, grad, shape);
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 5>(grads, parents, found.into_array());
    }
}

/// The node of a layer. It keeps the inputs and the output of attention.
#[derive(Debug)]
struct LayerBackward<B: HstuBackend>(FusedLayer<FloatTensor<B>>);

#[derive(Debug, Clone)]
struct SavedLayer<T> {
    inputs: LayerInputs<NodeId>,
    attended: T,
    options: LayerOptions,
}

impl<B: HstuBackend> Backward<B, 10> for LayerBackward<B> {
    type State = SavedLayer<FloatTensor<B>>;

    fn backward(
        self,
        ops: Ops<Self::State, 10>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let out = grads.consume::<B>(&ops.node);
        let SavedLayer { inputs, attended, options } = ops.state;
        let inputs = inputs.map_all(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let found = (self.0.backward)(inputs, LayerOutput { out, attended }, &options);
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 10>(grads, parents, found.into_array());
    }
}

/// The node of a two-layer network. It keeps the inputs.
#[derive(Debug)]
struct MlpBackward<B: HstuBackend>(FusedMlp<FloatTensor<B>>);

impl<B: HstuBackend> Backward<B, 5> for MlpBackward<B> {
    type State = MlpInputs<NodeId>;

    fn backward(
        self,
        ops: Ops<Self::State, 5>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let retrieve = |id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id);
        let inputs = ops.state.map_all(retrieve);
        let found = (self.0.backward)(inputs, grad, ops.parents[0].is_some());
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 5>(grads, parents, found.into_array());
    }
}

/// The node of sums over pairs. It keeps the inputs.
#[derive(Debug)]
struct PairBackward;

impl<B: HstuBackend> Backward<B, 2> for PairBackward {
    type State = (PairInputs<NodeId>, Arc<PairSum>);

    fn backward(
        self,
        ops: Ops<Self::State, 2>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let grad = grads.consume::<B>(&ops.node);
        let (PairInputs { a, b }, pairs) = ops.state;
        let [a, b] = [a, b].map(|id| checkpointer.retrieve_node_output::<FloatTensor<B>>(id));
        let found = pairs::backward::<B>(PairInputs { a, b }, grad, &pairs);
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 2>(grads, parents, [Some(found.a), Some(found.b)]);
    }
}

/// The node of embedding bags. It keeps no tensor.
#[derive(Debug)]
struct BagBackward;

impl<B: HstuBackend> Backward<B, 1> for BagBackward {
    type State = Arc<EmbeddingBags>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let grad = grads.consume::<B>(&ops.node);
        let parents = ops.parents.map(|parent| parent.map(|node| node.id));
        register::<B, 1>(grads, parents, [Some(B::embedding_bag_backward(grad, &ops.state))]);
    }
}

/// Adds the gradients of a node's parents. An untracked parent is None, and so is the gradient of
/// an absent table.
fn register<B: Backend, const N: usize>(
    grads: &mut Gradients,
    parents: [Option<NodeId>; N],
    found: [Option<FloatTensor<B>>; N],
) {
    for (parent, grad) in parents.into_iter().zip(found) {
        if let (Some(parent), Some(grad)) = (parent, grad) {
            grads.register::<B>(parent, grad);
        }
    }
}

impl<B: HstuBackend, C: CheckpointStrategy> HstuBackend for Autodiff<B, C> {
    fn mlp(inputs: MlpInputs<FloatTensor<Self>>) -> FloatTensor<Self> {
        let Some(fused) = B::FUSED_MLP else {
            return mlp::composed::<Self>(inputs);
        };
        let forward = fused.forward;
        let parents = inputs.as_ref().map_all(|tensor| tensor.node.clone()).into_array();
        let inner = inputs.clone().map_all(|tensor| tensor.primitive);
        match MlpBackward(fused).prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = inputs.as_ref().map_all(|tensor| prep.checkpoint(tensor));
                prep.finish(ids, forward(inner))
            }
            OpsKind::UnTracked(prep) => prep.finish(forward(inner)),
        }
    }

    fn hstu_layer(
        inputs: LayerInputs<FloatTensor<Self>>,
        options: &LayerOptions,
    ) -> FloatTensor<Self> {
        let Some(fused) = B::FUSED_LAYER else {
            return layer::composed::<Self>(inputs, options);
        };
        let forward = fused.forward;
        let parents = inputs.as_ref().map_all(|x| x.node.clone()).into_array();
        let parents =
            parents.map(|node| node.unwrap_or_else(|| placeholder::<B, C>(&inputs.x).node));
        let inner = inputs.clone().map_all(|x| x.primitive);
        match LayerBackward(fused).prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = inputs.as_ref().map_all(|tensor| prep.checkpoint(tensor));
                let LayerOutput { out, attended } = forward(inner, options);
                let saved = SavedLayer { inputs: ids, attended, options: options.clone() };
                prep.finish(saved, out)
            }
            OpsKind::UnTracked(prep) => prep.finish(forward(inner, options).out),
        }
    }

    fn pair_sum(
        PairInputs { a, b }: PairInputs<FloatTensor<Self>>,
        pairs: Arc<PairSum>,
    ) -> FloatTensor<Self> {
        let parents = [a.node.clone(), b.node.clone()];
        let inner = PairInputs { a: a.primitive.clone(), b: b.primitive.clone() };
        match PairBackward.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = PairInputs { a: prep.checkpoint(&a), b: prep.checkpoint(&b) };
                prep.finish((ids, pairs.clone()), B::pair_sum(inner, pairs))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::pair_sum(inner, pairs)),
        }
    }

    fn embedding_bag(table: FloatTensor<Self>, bags: Arc<EmbeddingBags>) -> FloatTensor<Self> {
        let out = B::embedding_bag(table.primitive, bags.clone());
        match BagBackward.prepare::<C>([table.node]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(bags, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        }
    }

    /// # Panics
    /// Always: the op has no second derivative.
    fn embedding_bag_backward(_: FloatTensor<Self>, _: &EmbeddingBags) -> FloatTensor<Self> {
        panic!("embedding bags have no second derivative: differentiate them only once")
    }

    fn hstu_attention(
        inputs: HstuInputs<FloatTensor<Self>>,
        shape: Arc<HstuAttention>,
    ) -> FloatTensor<Self> {
        let parents = inputs.as_ref().map(|x| x.node.clone()).into_array();
        let parents =
            parents.map(|node| node.unwrap_or_else(|| placeholder::<B, C>(&inputs.q).node));
        match HstuBackward.prepare::<C>(parents).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let ids = inputs.as_ref().map(|tensor| prep.checkpoint(tensor));
                let inner = inputs.map(|tensor| tensor.primitive);
                let saved = SavedAttention { inputs: ids, shape: shape.clone() };
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
            "HSTU attention has no second derivative: differentiate it only once, not on \
             Autodiff<Autodiff<_>>"
        )
    }
}

/// An untracked tensor in place of an absent table, because a node's number of parents is fixed.
fn placeholder<B: HstuBackend, C: CheckpointStrategy>(
    beside: &FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (device, dtype) = (B::float_device(&beside.primitive), beside.dtype());
    let zero = B::float_zeros(Shape::new([1]), &device, dtype.into());
    <Autodiff<B, C> as AutodiffBackend>::from_inner(zero)
}
