//! Runs a graph on a Burn backend: one code path for training and serving, on `Flex`, on CUDA, on
//! wgpu, and on each with `Autodiff`.
//!
//! A run has three steps. The host computes the ids ([`Executor::lookups`]), which gives the rows
//! of each table that the batch touches. The parameters become device tensors, tables with their
//! touched rows only ([`Executor::leaves`]). Then the nodes run in order ([`Executor::run`]). Burn
//! computes gradients; losses and optimisers are in `train`.

mod ids;
mod jagged;
mod ops;
mod segments;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{FloatDType, Shape as Dims, TensorData, TensorMetadata};
use hypercast_kernels::attention::HstuBackend;
use rand::rngs::SmallRng;

use super::batch::ExpertBatch;
use super::graph::{ExpertGraph, Lead, Node, Op, TensorShape, Type};
use super::params::Parameters;
use super::plan::reach;

pub use ids::Lookups;

/// A graph on a device.
pub struct Executor<B: HstuBackend> {
    graph: Arc<ExpertGraph>,
    device: B::Device,
    /// The nodes that a run computes first: the tasks' outputs, and scores where it predicts.
    outputs: Vec<usize>,
    /// The nodes beside them that a run computes.
    losses: Vec<usize>,
    /// The readers of each node's value among the nodes that both depend on.
    uses: Vec<u32>,
}

/// The results of a run.
pub struct GraphOutputs<B: Backend> {
    /// `[rows, tasks]`: logits of binary tasks, values of regressions, in the description's order.
    /// Ranking scores follow where it predicts.
    pub tasks: FloatTensor<B>,
    /// `[rows, losses]`, as [`ExpertGraph::loss_nodes`] has them; none without any.
    pub losses: Option<FloatTensor<B>>,
}

impl<B: HstuBackend> Executor<B> {
    /// Puts `graph` on `device`, to predict: what only losses need is not computed.
    pub fn new(graph: Arc<ExpertGraph>, device: B::Device) -> Executor<B> {
        let predicted = graph.predicted();
        Executor::with(graph, device, predicted, Vec::new())
    }

    /// Puts `graph` on `device`, to learn: its runs compute losses, too.
    pub fn learning(graph: Arc<ExpertGraph>, device: B::Device) -> Executor<B> {
        let (outputs, losses) = (graph.outputs.clone(), graph.loss_nodes());
        Executor::with(graph, device, outputs, losses)
    }

    fn with(
        graph: Arc<ExpertGraph>,
        device: B::Device,
        outputs: Vec<usize>,
        losses: Vec<usize>,
    ) -> Executor<B> {
        let mut uses = vec![0; graph.nodes.len()];
        let ends: Vec<usize> = outputs.iter().chain(&losses).copied().collect();
        let needed = reach(&graph, &ends);
        let needed = graph.nodes.iter().zip(needed).filter(|(_, needed)| *needed);
        for input in needed.flat_map(|(node, _)| &node.inputs).chain(&ends) {
            uses[*input] += 1;
        }
        Executor { graph, device, outputs, losses, uses }
    }

    /// Computes the batch's ids and table rows on the host.
    pub fn lookups(&self, batch: &ExpertBatch) -> Lookups {
        Lookups::new(&self.graph, &self.uses, batch)
    }

    /// One device tensor for each parameter: the whole of a dense one, the touched rows of a table
    /// in the order of `lookups.rows`. Those in `kept` are on the device already.
    pub fn leaves(
        &self,
        parameters: &Parameters,
        lookups: &Lookups,
        kept: &[Option<FloatTensor<B>>],
    ) -> Vec<FloatTensor<B>> {
        let leaf = |(index, rows): (usize, &Option<Vec<u32>>)| match (rows, kept.get(index)) {
            (_, Some(Some(leaf))) => leaf.clone(),
            (None, _) => self.dense_leaf(parameters, index),
            (Some(rows), _) => self.table_leaf(parameters, index, rows),
        };
        lookups.rows.iter().enumerate().map(leaf).collect()
    }

    /// The device tensor of a whole parameter.
    pub fn dense_leaf(&self, parameters: &Parameters, index: usize) -> FloatTensor<B> {
        self.upload(parameters.values(index).to_vec(), &self.graph.parameters[index].shape)
    }

    /// The device tensor of some rows of a table.
    fn table_leaf(&self, parameters: &Parameters, index: usize, rows: &[u32]) -> FloatTensor<B> {
        let width = self.graph.parameters[index].shape[1];
        // A device tensor has at least one row, so an unread table gets its first.
        let rows = if rows.is_empty() { &[0][..] } else { rows };
        self.upload(parameters.gather(index, rows), &[rows.len(), width])
    }

    /// Runs the graph on `batch` with its `lookups`, and the leaves of these lookups. Dropout is
    /// active if `dropout` is given.
    ///
    /// # Panics
    /// If the batch has no row.
    pub fn run(
        &self,
        leaves: &[FloatTensor<B>],
        lookups: &Lookups,
        batch: &ExpertBatch,
        dropout: Option<&mut SmallRng>,
    ) -> GraphOutputs<B> {
        assert!(batch.rows > 0, "a batch has at least one row");
        let mut run = GraphRun {
            executor: self,
            leaves,
            lookups,
            batch,
            dropout,
            values: vec![None; self.graph.nodes.len()],
            left: self.uses.clone(),
        };
        for (index, node) in self.graph.nodes.iter().enumerate() {
            // Values without a reader are not computed, and ids are in `lookups`.
            if node.ty == Type::Number && self.uses[index] > 0 {
                run.values[index] = Some(run.node(index, node));
            }
        }
        let mut beside = |nodes: &[usize]| -> Option<FloatTensor<B>> {
            let mut values: Vec<_> = nodes.iter().map(|node| run.take(*node)).collect();
            if values.len() > 1 { Some(B::float_cat(values, 1)) } else { values.pop() }
        };
        let tasks = beside(&self.outputs).expect("a graph has an output");
        GraphOutputs { tasks, losses: beside(&self.losses) }
    }

    /// Copies values to the device.
    pub fn upload(&self, values: Vec<f32>, dims: &[usize]) -> FloatTensor<B> {
        upload::<B>(values, dims, &self.device)
    }
}

fn upload<B: Backend>(values: Vec<f32>, dims: &[usize], device: &B::Device) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, Dims::from(dims.to_vec())), device)
}

/// Copies a tensor back to the host.
pub fn download<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = burn::tensor::read_sync(B::float_into_data(tensor)).expect("the device is alive");
    data.convert::<f32>().into_vec().expect("the data was converted to f32")
}

/// One run in progress.
struct GraphRun<'a, B: HstuBackend> {
    executor: &'a Executor<B>,
    leaves: &'a [FloatTensor<B>],
    lookups: &'a Lookups,
    batch: &'a ExpertBatch,
    dropout: Option<&'a mut SmallRng>,
    values: Vec<Option<FloatTensor<B>>>,
    left: Vec<u32>,
}

impl<B: HstuBackend> GraphRun<'_, B> {
    /// The value of a node. Its last reader becomes the only owner, so the backend can work in
    /// place.
    fn take(&mut self, node: usize) -> FloatTensor<B> {
        self.left[node] -= 1;
        let value =
            if self.left[node] == 0 { self.values[node].take() } else { self.values[node].clone() };
        value.expect("a node runs before its readers")
    }

    fn node(&mut self, index: usize, node: &Node) -> FloatTensor<B> {
        let nodes = &self.executor.graph.nodes;
        let numbers = node.inputs.iter().filter(|input| nodes[**input].ty == Type::Number);
        let inputs: Vec<FloatTensor<B>> = numbers.map(|input| self.take(*input)).collect();
        let device = &self.executor.device;
        match &node.op {
            Op::Input { column } => {
                let values = self.batch.numbers(*column).into_owned();
                upload::<B>(values, &self.dims(&node.shape), device)
            }
            Op::Parameter { parameter } => self.leaves[*parameter].clone(),
            Op::Constant { value, .. } => B::float_full(
                Dims::from(node.shape.dims.clone()),
                (*value).into(),
                device,
                FloatDType::F32,
            ),
            Op::Outcome { part, task } => {
                let values = self.batch.outcome(*part, *task);
                upload::<B>(values, &self.dims(&node.shape), device)
            }
            Op::SegmentPairSum { functions } => {
                segments::pair_sum::<B>(self.batch, exactly(inputs), functions)
            }
            Op::Cast => upload::<B>(self.lookups.cast(index), &self.dims(&node.shape), device),
            Op::Concat { axis } => B::float_cat(inputs, *axis),
            Op::HstuAttention { heads, max_len } => {
                jagged::attention::<B>(self.batch, inputs, *heads, *max_len)
            }
            Op::HstuHistory { heads, max_len } => {
                jagged::history_attention::<B>(self.batch, inputs, *heads, *max_len)
            }
            Op::Where => {
                let [c, a, b] = exactly(inputs);
                ops::select_where::<B>(c, a, b)
            }
            Op::LayerNormalization { epsilon } => {
                let [x, scale, bias] = exactly(inputs);
                ops::layer_norm::<B>(x, scale, bias, *epsilon)
            }
            Op::MatMul => {
                let [a, b] = exactly(inputs);
                ops::matmul::<B>(a, b, &self.dims(&node.shape))
            }
            Op::Binary(op) | Op::Compare(op) => {
                let [a, b] = exactly(inputs);
                ops::zip::<B>(*op, a, b, node.shape.rank())
            }
            _ => {
                let [x] = exactly(inputs);
                self.unary(index, node, x)
            }
        }
    }

    fn unary(&mut self, index: usize, node: &Node, x: FloatTensor<B>) -> FloatTensor<B> {
        match &node.op {
            Op::Unary(op) => ops::unary::<B>(*op, x),
            Op::Clip { min, max } => B::float_clamp(x, (*min).into(), (*max).into()),
            Op::Softmax { axis } => ops::softmax::<B>(x, *axis),
            Op::Slice { axis, start, end } => ops::slice::<B>(x, *axis, *start..*end),
            Op::Reshape { .. } => B::float_reshape(x, Dims::from(self.dims(&node.shape))),
            Op::Transpose { perm } => B::float_permute(x, perm),
            Op::Reduce { kind, axis } => ops::reduce::<B>(*kind, x, *axis),
            Op::Dropout { rate, per_row } => match &mut self.dropout {
                Some(rng) => ops::dropout::<B>(x, *rate, *per_row, rng),
                None => x,
            },
            Op::StopGradient => B::float_set_require_grad(x, false),
            Op::EmbeddingBag | Op::Gather => {
                let index = &self.lookups.index[index];
                ops::embedding_bag::<B>(x, index, self.lead(&node.shape))
            }
            Op::Pool(kind) => jagged::pool::<B>(self.batch, *kind, x),
            Op::Segment(kind) => segments::fold::<B>(self.batch, *kind, x),
            Op::SegmentRank => segments::rank::<B>(self.batch, x),
            op => unreachable!("{op:?} has its own arm"),
        }
    }

    /// The dimensions of `shape` in this batch.
    fn dims(&self, shape: &TensorShape) -> Vec<usize> {
        let lead = shape.lead.map(|_| self.lead(shape));
        lead.into_iter().chain(shape.dims.iter().copied()).collect()
    }

    fn lead(&self, shape: &TensorShape) -> usize {
        match shape.lead {
            Some(Lead::History) => self.batch.history_events().max(1),
            _ => self.batch.rows,
        }
    }
}

fn exactly<T, const N: usize>(inputs: Vec<T>) -> [T; N] {
    inputs.try_into().ok().expect("the number of inputs was checked with the graph")
}

fn dims_of<T: TensorMetadata>(tensor: &T) -> Vec<usize> {
    tensor.shape().as_slice().to_vec()
}
