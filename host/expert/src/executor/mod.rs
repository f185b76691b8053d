//! Runs a graph on a Burn backend: one code path for training and inference,
//! on `Flex`, on CUDA, and on their `Autodiff` kin.
//!
//! A run has three steps: ids are worked out on the host ([`Executor::lookups`]),
//! which says what rows of each table the batch touches; the parameters become
//! device tensors, tables by their touched rows only ([`Executor::leaves`]); and
//! the nodes run in order ([`Executor::run`]). Gradients are Burn's business,
//! losses and optimisers `train`'s.

mod ids;
mod jagged;
mod ops;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{FloatDType, Shape as Dims, TensorData, TensorMetadata};
use hypercast_kernels::attention::HstuBackend;
use rand::rngs::SmallRng;

use super::batch::ExpertBatch;
use super::graph::{Graph, Lead, Node, Op, Shape, Type};
use super::params::Parameters;
pub use ids::{Lookups, hash_id};
use jagged::Jagged;

/// A graph on a device.
pub struct Executor<B: HstuBackend> {
    graph: Arc<Graph>,
    device: B::Device,
    /// How many times each node's value is read.
    uses: Vec<u32>,
}

/// What a run gives.
pub struct Outputs<B: Backend> {
    /// `[rows, tasks]`: logits of binary tasks, values of regressions, in the description's order.
    pub tasks: FloatTensor<B>,
    /// `[rows, 1]`: the extra loss of each row.
    pub extra_loss: Option<FloatTensor<B>>,
}

impl<B: HstuBackend> Executor<B> {
    /// Puts `graph` on `device`.
    pub fn new(graph: Arc<Graph>, device: B::Device) -> Executor<B> {
        let mut uses = vec![0; graph.nodes.len()];
        let read = graph.nodes.iter().flat_map(|node| &node.inputs);
        for input in read.chain(&graph.outputs).chain(&graph.extra_loss) {
            uses[*input] += 1;
        }
        Executor { graph, device, uses }
    }

    /// The graph.
    pub fn graph(&self) -> &Arc<Graph> {
        &self.graph
    }

    /// Works out the batch's ids on the host.
    pub fn lookups(&self, batch: &ExpertBatch) -> Lookups {
        Lookups::new(&self.graph, batch)
    }

    /// A device tensor a parameter: dense ones whole, tables by the rows that
    /// the batch touches, in the order of `lookups.rows`.
    pub fn leaves(&self, parameters: &Parameters, lookups: &Lookups) -> Vec<FloatTensor<B>> {
        let leaf = |index: usize| match &lookups.rows[index] {
            None => self.dense_leaf(parameters, index),
            Some(rows) => {
                let width = self.graph.parameters[index].shape[1];
                self.upload(parameters.gather(index, rows), &[rows.len(), width])
            }
        };
        (0..self.graph.parameters.len()).map(leaf).collect()
    }

    /// The device tensor of a whole parameter.
    pub fn dense_leaf(&self, parameters: &Parameters, index: usize) -> FloatTensor<B> {
        self.upload(parameters.values(index).to_vec(), &self.graph.parameters[index].shape)
    }

    /// The device tensor of a table's touched rows.
    pub fn table_leaf(
        &self,
        parameters: &Parameters,
        index: usize,
        rows: &[u32],
    ) -> FloatTensor<B> {
        self.upload(
            parameters.gather(index, rows),
            &[rows.len(), self.graph.parameters[index].shape[1]],
        )
    }

    /// Runs the graph. `leaves` are those of `lookups`, one a parameter.
    /// Dropout is active where `dropout` gives it randomness.
    ///
    /// # Panics
    /// Where the batch has no row.
    pub fn run(
        &self,
        leaves: &[FloatTensor<B>],
        lookups: &Lookups,
        batch: &ExpertBatch,
        dropout: Option<&mut SmallRng>,
    ) -> Outputs<B> {
        assert!(batch.rows > 0, "a batch has at least one row");
        let mut run = Run {
            executor: self,
            leaves,
            lookups,
            batch,
            jagged: Jagged::new(batch),
            dropout,
            values: vec![None; self.graph.nodes.len()],
            left: self.uses.clone(),
        };
        for (index, node) in self.graph.nodes.iter().enumerate() {
            // What nobody reads is not worth running; ids live in `lookups`.
            if node.ty == Type::Number && self.uses[index] > 0 {
                run.values[index] = Some(run.node(index, node));
            }
        }
        let tasks: Vec<FloatTensor<B>> =
            self.graph.outputs.iter().map(|output| run.take(*output)).collect();
        let extra_loss = self.graph.extra_loss.map(|node| run.take(node));
        let tasks =
            if tasks.len() == 1 { tasks.into_iter().next() } else { Some(B::float_cat(tasks, 1)) };
        Outputs { tasks: tasks.expect("a graph has an output"), extra_loss }
    }

    /// Moves values to the device.
    pub fn upload(&self, values: Vec<f32>, dims: &[usize]) -> FloatTensor<B> {
        upload::<B>(values, dims, &self.device)
    }
}

fn upload<B: Backend>(values: Vec<f32>, dims: &[usize], device: &B::Device) -> FloatTensor<B> {
    B::float_from_data(TensorData::new(values, Dims::from(dims.to_vec())), device)
}

/// Reads a tensor back to the host.
pub fn download<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = burn::tensor::read_sync(B::float_into_data(tensor)).expect("the device is alive");
    data.convert::<f32>().into_vec().expect("the data was converted to f32")
}

/// One run in progress.
struct Run<'a, B: HstuBackend> {
    executor: &'a Executor<B>,
    leaves: &'a [FloatTensor<B>],
    lookups: &'a Lookups,
    batch: &'a ExpertBatch,
    jagged: Jagged<B>,
    dropout: Option<&'a mut SmallRng>,
    values: Vec<Option<FloatTensor<B>>>,
    left: Vec<u32>,
}

impl<B: HstuBackend> Run<'_, B> {
    /// The value of a node; its last reader gets it whole, so that the backend
    /// can work in place.
    fn take(&mut self, node: usize) -> FloatTensor<B> {
        self.left[node] -= 1;
        let value =
            if self.left[node] == 0 { self.values[node].take() } else { self.values[node].clone() };
        value.expect("a node runs before its readers")
    }

    fn node(&mut self, index: usize, node: &Node) -> FloatTensor<B> {
        if let Some(value) = self.source(index, node) {
            return value;
        }
        let inputs = node
            .inputs
            .iter()
            .filter(|input| self.executor.graph.nodes[**input].ty == Type::Number);
        let mut inputs: Vec<FloatTensor<B>> = inputs.map(|input| self.take(*input)).collect();
        let rank = node.shape.rank();
        match &node.op {
            Op::Concat { axis } => B::float_cat(inputs, *axis),
            Op::HstuAttention { heads, max_len } => self.jagged.attention(inputs, *heads, *max_len),
            Op::HstuHistory { heads, max_len } => {
                self.jagged.history_attention(inputs, *heads, *max_len)
            }
            Op::Where => {
                let [c, a, b] = three(inputs);
                ops::select_where::<B>(c, a, b)
            }
            Op::LayerNormalization { epsilon } => {
                let [x, scale, bias] = three(inputs);
                ops::layer_norm::<B>(x, scale, bias, *epsilon)
            }
            Op::MatMul | Op::Binary(_) | Op::Compare(_) => {
                let (b, a) = (inputs.pop().expect("two inputs"), inputs.pop().expect("two inputs"));
                match &node.op {
                    Op::Binary(op) => ops::binary::<B>(*op, a, b, rank),
                    Op::Compare(op) => ops::compare::<B>(*op, a, b, rank),
                    _ => ops::matmul::<B>(a, b, &self.dims(&node.shape)),
                }
            }
            _ => {
                let x = inputs.pop().expect("one input");
                self.unary(index, node, x)
            }
        }
    }

    /// Nodes without f32 inputs.
    fn source(&mut self, index: usize, node: &Node) -> Option<FloatTensor<B>> {
        let device = &self.executor.device;
        Some(match &node.op {
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
            Op::Cast => upload::<B>(self.lookups.cast(index), &self.dims(&node.shape), device),
            _ => return None,
        })
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
                let index = self.lookups.index(index);
                ops::embedding_bag::<B>(x, index, self.lead(&node.shape))
            }
            Op::Pool(kind) => self.jagged.pool(*kind, x),
            op => unreachable!("{} has its own arm", op.name()),
        }
    }

    /// The shape with the batch's sizes.
    fn dims(&self, shape: &Shape) -> Vec<usize> {
        let lead = shape.lead.map(|_| self.lead(shape));
        lead.into_iter().chain(shape.dims.iter().copied()).collect()
    }

    fn lead(&self, shape: &Shape) -> usize {
        match shape.lead {
            Some(Lead::History) => self.batch.history_events().max(1),
            _ => self.batch.rows,
        }
    }
}

fn three<T>(inputs: Vec<T>) -> [T; 3] {
    inputs.try_into().ok().expect("the graph was checked: three inputs")
}

/// The dimensions of a tensor.
fn dims_of<T: TensorMetadata>(tensor: &T) -> Vec<usize> {
    tensor.shape().as_slice().to_vec()
}
