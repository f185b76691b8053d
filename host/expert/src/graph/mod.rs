//! An expert's network as the host accepts it: a checked, typed graph with inferred shapes and a
//! known cost.
//!
//! An [`ExpertGraph`] satisfies all rules of `sdk/wit/ops.md`, so later stages do not check shapes
//! again. Every op works within `rows` or within `history` and leaves the symbolic dimension first.
//! Only the HSTU and pooling ops cross between the two, and only they and the segment ops read one
//! row for another, by the host's offsets. So no graph can move one request's data into another
//! request. The `executor` runs a graph.
//!
//! To add an operator: its name and attributes in `op`, its shape and cost in `infer`, its
//! computation in `executor` (and in `compiled`, if it works row by row).

mod infer;
mod memory;
mod op;
mod options;
mod validate;

use std::fmt;
use std::sync::Arc;

pub use hypercast_kernels::cpu::program::{Fold, Zip};
pub use hypercast_kernels::pairs::PairFunction;
pub use infer::Cost;
pub use memory::{LargestNode, NetworkMemory, NetworkUse};
#[cfg(test)]
pub(crate) use op::names_of_variants;
pub use op::{Op, OutcomePart, Unary};
pub use validate::GraphLimits;

use super::wasm::contract::{Column, Initialiser};

/// A symbolic dimension: its size is known only for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lead {
    /// Candidates, or examples in training.
    Rows,
    /// Events of the short history.
    History,
}

/// A shape: at most one symbolic dimension, first, then fixed ones. Rank 1 to 4.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TensorShape {
    /// The symbolic first dimension, if it has one.
    pub lead: Option<Lead>,
    /// The fixed dimensions.
    pub dims: Vec<usize>,
}

impl TensorShape {
    /// A shape of fixed dimensions.
    pub fn fixed(dims: &[usize]) -> TensorShape {
        TensorShape { lead: None, dims: dims.to_vec() }
    }

    /// A symbolic dimension, then fixed ones.
    pub fn led(lead: Lead, dims: &[usize]) -> TensorShape {
        TensorShape { lead: Some(lead), dims: dims.to_vec() }
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.lead.iter().len() + self.dims.len()
    }

    /// The number of elements of one row (or event); of all if the shape is fixed.
    pub fn row_elements(&self) -> usize {
        self.dims.iter().fold(1, |product, dim| product.saturating_mul(*dim))
    }
}

// The text is hashed into every parameter file: see [`ExpertGraph::hash`].
impl fmt::Debug for TensorShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shape").field("lead", &self.lead).field("dims", &self.dims).finish()
    }
}

impl fmt::Display for TensorShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lead = self.lead.map(|lead| format!("{lead:?}").to_lowercase());
        let dims = self.dims.iter().map(usize::to_string);
        let dims: Vec<String> = lead.into_iter().chain(dims).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

/// The type of a value's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// f32 with a gradient.
    Number,
    /// i64 ids without gradient or arithmetic.
    Id,
}

/// A node of a graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// The operator with its attributes.
    pub op: Op,
    /// Indices of the earlier nodes that it reads.
    pub inputs: Vec<usize>,
    /// The type of its value.
    pub ty: Type,
    /// The shape of its value.
    pub shape: TensorShape,
    /// The layer of the plugin's code that made it, for messages.
    pub layer: String,
}

/// What a batch holds of a column.
#[derive(Debug, Clone, PartialEq)]
pub struct ColumnValues {
    /// The type of the values.
    pub ty: Type,
    /// Led by rows or by the events of the history.
    pub shape: TensorShape,
}

/// A parameter of the network.
#[derive(Clone)]
pub struct ParameterSpec {
    /// Unique in the graph.
    pub name: String,
    /// Its dimensions; rank 1 to 4.
    pub shape: Vec<usize>,
    /// The distribution of its initial values.
    pub init: Initialiser,
    /// Whether it is an embedding table: only `EmbeddingBag` and `Gather` read it, so a batch
    /// touches few of its rows.
    pub table: bool,
    /// The factor of its learning rate; 0 freezes it.
    pub rate_factor: f32,
    /// Its decoupled weight decay, in place of the operator's.
    pub weight_decay: Option<f32>,
    /// What it is trained with.
    pub optimiser: ParameterOptimiser,
    /// What it begins with, if the plugin has values for it.
    pub values: Option<Arc<Vec<f32>>>,
}

impl ParameterSpec {
    /// Whether training changes it.
    pub fn learns(&self) -> bool {
        self.rate_factor != 0.0
    }
}

/// How a parameter is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterOptimiser {
    /// AdamW; the default of dense parameters, and for them alone.
    Adam,
    /// Without state.
    Sgd,
    /// Adagrad: of the touched rows of a table, which is their default, or of single values.
    Adagrad,
}

// The text is hashed into every parameter file: see [`ExpertGraph::hash`]. How a parameter is
// trained does not change what its values mean.
impl fmt::Debug for ParameterSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParameterSpec")
            .field("name", &self.name)
            .field("shape", &self.shape)
            .field("init", &self.init)
            .field("table", &self.table)
            .finish()
    }
}

impl ParameterSpec {
    /// The number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no value. False for all parameters of a checked graph.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A network that passed all checks.
#[derive(Debug, Clone)]
pub struct ExpertGraph {
    /// The plugin's name.
    pub plugin: String,
    /// The description's columns, which `Input` nodes index.
    pub columns: Vec<Column>,
    /// What a batch holds of each of them, whether or not a node reads it.
    pub column_values: Vec<ColumnValues>,
    /// The nodes; each reads earlier ones only.
    pub nodes: Vec<Node>,
    /// The parameters, which `Parameter` nodes index.
    pub parameters: Vec<ParameterSpec>,
    /// The output node of each task, in the description's order.
    pub outputs: Vec<usize>,
    /// Of each of them, whether its option `base` says that it is the whole logit, or the value in
    /// the label's unit.
    pub whole_outputs: Vec<bool>,
    /// The node of each task's ranking score, in the description's order; none of a task that is
    /// ranked by its prediction.
    pub scores: Vec<Option<usize>>,
    /// The node that is the loss of each task, in the description's order; none for the host's.
    pub losses: Vec<Option<usize>>,
    /// The node whose mean is added to the loss.
    pub extra_loss: Option<usize>,
    /// The upper bound of the gradient's norm, in place of the operator's.
    pub gradient_clip: Option<f32>,
    /// The floating-point operations of a run.
    pub cost: Cost,
    /// What it needs to serve, with the sizes of [`GraphLimits::serving`].
    pub serving_memory: NetworkMemory,
    /// What it needs to train, with the sizes of [`GraphLimits::training`].
    pub training_memory: NetworkMemory,
    /// Equal for equal networks: FNV-1a over the `Debug` text of nodes, parameters, outputs and
    /// losses. It is in every parameter file, so a change of that text (a renamed field, too) makes
    /// all existing files unusable.
    pub hash: u64,
}

impl ExpertGraph {
    /// The number of values over all parameters.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(ParameterSpec::len).sum()
    }

    /// The nodes that predictions need: the tasks' outputs, then the ranking scores of those that
    /// have one, in the description's order.
    pub fn predicted(&self) -> Vec<usize> {
        self.outputs.iter().chain(self.scores.iter().flatten()).copied().collect()
    }

    /// The nodes that only training computes: the losses of tasks that have one, in the
    /// description's order, then the extra loss.
    pub fn loss_nodes(&self) -> Vec<usize> {
        self.losses.iter().flatten().chain(&self.extra_loss).copied().collect()
    }

    /// The nodes that a training step computes: outputs, then losses.
    pub fn ends(&self) -> Vec<usize> {
        [self.outputs.clone(), self.loss_nodes()].concat()
    }

    /// Whether the last functions of a node give it a bound of its own, as a `Sigmoid` or `Relu`
    /// does, whatever parameters scale and shift it.
    pub fn is_bounded(&self, node: usize) -> bool {
        let Node { op, inputs, .. } = &self.nodes[node];
        match op {
            Op::Unary(Unary::Neg) | Op::Dropout { .. } | Op::StopGradient | Op::Reshape { .. } => {
                self.is_bounded(inputs[0])
            }
            Op::Unary(Unary::Log) => false,
            Op::Unary(_) | Op::Clip { .. } | Op::Softmax { .. } => true,
            Op::Binary(Zip::Max | Zip::Min) => true,
            Op::Binary(_) => {
                let mut operands =
                    inputs.iter().filter(|input| self.reads_data(**input)).peekable();
                operands.peek().is_some() && operands.all(|input| self.is_bounded(*input))
            }
            _ => false,
        }
    }

    /// Whether a node is more than a parameter, a constant, or a row of a table.
    fn reads_data(&self, node: usize) -> bool {
        !matches!(
            self.nodes[node].op,
            Op::Parameter { .. } | Op::Constant { .. } | Op::Gather | Op::EmbeddingBag
        )
    }
}

/// The 64-bit FNV-1a hash of `bytes`; `seed` changes its start, and 0 is the plain hash.
pub(super) fn fnv1a(seed: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_of_the_last_functions_is_seen_through_scales_and_shifts() {
        use crate::tests::build::{Net, description};
        use crate::wasm::contract::TaskKind;
        let tasks = ["linear", "sigmoid", "softplus-of-linear", "sum"];
        let tasks = tasks.map(|name| (name, TaskKind::Regression));
        let description = description(vec![Column::Feature("length".into())], &tasks);
        let mut net = Net::new();
        let input = net.input(0);
        let weight = net.parameter("weight", &[1, 1], Initialiser::Ones);
        let scale = net.parameter("scale", &[1], Initialiser::Ones);
        let linear = net.op("MatMul", &[input, weight], vec![]);
        let shifted = net.op("Add", &[linear, scale], vec![]);
        let sigmoid = net.op("Sigmoid", &[shifted], vec![]);
        let scaled = net.op("Mul", &[sigmoid, scale], vec![]);
        let softplus = net.op("Softplus", &[linear], vec![]);
        let sum = net.op("Add", &[linear, sigmoid], vec![]);
        for ((task, _), node) in tasks.iter().zip([shifted, scaled, softplus, sum]) {
            net.output(task, node);
        }
        let graph = net.valid(&description);
        let bounded: Vec<bool> =
            graph.outputs.iter().map(|output| graph.is_bounded(*output)).collect();
        assert_eq!(bounded, [false, true, true, false]);
    }

    #[test]
    fn the_text_that_is_hashed_stays() {
        let op = Op::Reduce { kind: Fold::Sum, axis: 1 };
        let shape = TensorShape::led(Lead::Rows, &[4]);
        let node = Node { op, inputs: vec![0], ty: Type::Number, shape, layer: "tower".into() };
        assert_eq!(
            format!("{node:?}"),
            "Node { op: Reduce { kind: Sum, axis: 1 }, inputs: [0], ty: Number, \
             shape: Shape { lead: Some(Rows), dims: [4] }, layer: \"tower\" }"
        );
        let name = "table".to_owned();
        let init = Initialiser::Normal(0.5);
        let spec = ParameterSpec {
            name,
            shape: vec![7, 2],
            init,
            table: true,
            rate_factor: 0.5,
            weight_decay: Some(0.1),
            optimiser: ParameterOptimiser::Sgd,
            values: None,
        };
        assert_eq!(
            format!("{spec:?}"),
            "ParameterSpec { name: \"table\", shape: [7, 2], init: Initialiser::Normal(0.5), \
             table: true }"
        );
        assert_eq!(fnv1a(0, b"a"), 0xaf63_dc4c_8601_ec8c, "the published test vector");
    }
}
