//! An expert's network as the host admits it: a checked, typed graph with
//! inferred shapes and a known cost.
//!
//! A [`Graph`] exists only if every rule of `sdk/wit/ops.md` holds, so nothing
//! after this stage checks shapes again. Every op works within `rows` or within
//! `history` and never moves a symbolic dimension; only the HSTU and pooling ops
//! cross, by the host's offsets. So no graph can carry one request's data into
//! another's. It does not run anything: see `executor`.

mod cost;
mod infer;
mod op;
mod validate;

use std::fmt;

pub use cost::Cost;
pub use op::{Binary, Compare, Op, Reduction, Unary};
pub use validate::GraphLimits;

use super::wasm::contract::{Column, Initialiser};

/// A symbolic dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lead {
    /// Candidates, or examples in training.
    Rows,
    /// Events of the short history.
    History,
}

/// A shape: at most one symbolic dimension, first, then fixed ones. Rank 1 to 4.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    /// The symbolic first dimension, if there is one.
    pub lead: Option<Lead>,
    /// The fixed dimensions.
    pub dims: Vec<usize>,
}

impl Shape {
    /// A shape of fixed dimensions.
    pub fn fixed(dims: &[usize]) -> Shape {
        Shape { lead: None, dims: dims.to_vec() }
    }

    /// A symbolic dimension, then fixed ones.
    pub fn led(lead: Lead, dims: &[usize]) -> Shape {
        Shape { lead: Some(lead), dims: dims.to_vec() }
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        self.lead.iter().len() + self.dims.len()
    }

    /// The elements of one row (or event), or of the whole where the shape is fixed.
    pub fn row_elements(&self) -> usize {
        self.dims.iter().fold(1, |product, dim| product.saturating_mul(*dim))
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lead = self.lead.map(|lead| match lead {
            Lead::Rows => "rows".to_owned(),
            Lead::History => "history".to_owned(),
        });
        let dims: Vec<String> =
            lead.into_iter().chain(self.dims.iter().map(usize::to_string)).collect();
        write!(f, "[{}]", dims.join(", "))
    }
}

/// What a value holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Type {
    /// f32, with gradient.
    Number,
    /// i64 ids, without gradient and without arithmetic.
    Id,
}

/// A node. Its inputs are earlier nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// What it does.
    pub op: Op,
    /// Indices of earlier nodes.
    pub inputs: Vec<usize>,
    /// The type of its value.
    pub ty: Type,
    /// The shape of its value.
    pub shape: Shape,
    /// The layer it belongs to.
    pub layer: String,
}

/// A parameter of the network.
#[derive(Debug, Clone)]
pub struct ParameterSpec {
    /// Unique in the graph.
    pub name: String,
    /// Its dimensions; rank 1 to 4.
    pub shape: Vec<usize>,
    /// How it starts.
    pub init: Initialiser,
    /// Whether it is read by rows only (`EmbeddingBag`, `Gather`), so that a
    /// batch touches few of its rows.
    pub table: bool,
}

impl ParameterSpec {
    /// The number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no value; a checked graph has no such parameter.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A checked network.
#[derive(Debug, Clone)]
pub struct Graph {
    /// The plugin's name.
    pub plugin: String,
    /// The columns that `Input` nodes index.
    pub columns: Vec<Column>,
    /// The nodes, in order.
    pub nodes: Vec<Node>,
    /// The parameters.
    pub parameters: Vec<ParameterSpec>,
    /// The output node of each task, in the description's order.
    pub outputs: Vec<usize>,
    /// The node whose mean is added to the loss.
    pub extra_loss: Option<usize>,
    /// What running it costs.
    pub cost: Cost,
    /// FNV-1a over nodes, parameters and outputs: equal for equal networks.
    pub hash: u64,
}

impl Graph {
    /// The number of parameter values.
    pub fn parameter_count(&self) -> usize {
        self.parameters.iter().map(ParameterSpec::len).sum()
    }
}
