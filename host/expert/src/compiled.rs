//! A graph compiled for serving on the CPU: all nodes that work row by row become one program with
//! its weights laid out, compiled once a version.
//!
//! The other nodes (short histories, tensors of higher rank) stay with the executor. It runs first,
//! and its results are inputs of the program. Training does not use this module.

use std::sync::Arc;

use burn_flex::Flex;
use hypercast_core::hash::mix64;
use hypercast_kernels::cpu::program::{
    Map, Operand, Program, ProgramFeed, ProgramStep, RowOperator,
};
use hypercast_kernels::cpu::{Isa, Prepared, StridedRows};

use super::batch::{ColumnData, ExpertBatch};
use super::graph::{ExpertGraph, Lead, Node, Op, Type, Unary, Zip};
use super::network::{BufferPool, OnDevice, ServingNetwork};
use super::params::Parameters;
use super::wasm::contract::Column;

/// A network for serving.
pub struct Compiled {
    program: Program,
    /// Columns of the batch that are the program's first inputs; the block of features follows.
    columns: Vec<usize>,
    lookups: Vec<Lookup>,
    /// For each lookup, the table rows that a request reads.
    indices: BufferPool<Vec<Vec<u32>>>,
    /// The nodes that stay with the executor.
    rest: Option<ExecutorPart>,
}

/// The part of a graph that the executor runs.
struct ExecutorPart {
    network: OnDevice<Flex>,
    /// Of each of its results.
    widths: Vec<usize>,
}

/// How the ids of a column become rows of a table.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Lookup {
    column: usize,
    entries: u64,
    hashed: bool,
}

impl Compiled {
    /// Compiles a graph with its trained parameters.
    pub fn new(graph: &ExpertGraph, parameters: Parameters) -> Self {
        let mut compiler = Compiler::new(graph, &parameters);
        for at in 0..graph.nodes.len() {
            if compiler.needed[at] && graph.nodes[at].ty == Type::Number {
                compiler.compiled[at] = compiler.node(at);
            }
        }
        let outputs: Vec<Operand> =
            graph.outputs.iter().map(|output| compiler.operand(*output)).collect();
        let Compiler { steps, constants, columns, lookups, rest, .. } = compiler;
        let program = Program::new(steps, constants, outputs);
        let rest = (!rest.is_empty()).then(|| {
            let widths = rest.iter().map(|node| graph.nodes[*node].shape.dims[0]).collect();
            let graph = Arc::new(pruned(graph, &rest));
            ExecutorPart { network: OnDevice::new(graph, parameters, Default::default()), widths }
        });
        Self { program, columns, lookups, indices: BufferPool::default(), rest }
    }
}

impl ServingNetwork for Compiled {
    fn outputs(&self, batch: &ExpertBatch) -> Vec<f32> {
        let rest = self.rest.as_ref().map_or_else(Vec::new, |rest| {
            columns_of(&rest.network.outputs(batch), &rest.widths, batch.rows)
        });
        let numbers = |column: &usize| match &batch.columns[*column] {
            ColumnData::Numbers(values) => values.as_slice(),
            ColumnData::Ids(_) | ColumnData::Feature(_) => {
                unreachable!("ids are looked up, and features are one block")
            }
        };
        let columns = self.columns.iter().map(numbers);
        let inputs: Vec<&[f32]> = columns
            .chain([batch.features.as_slice()])
            .chain(rest.iter().map(Vec::as_slice))
            .collect();
        self.indices.with(|indices| {
            indices.resize(self.lookups.len(), Vec::new());
            for (lookup, rows) in self.lookups.iter().zip(&mut *indices) {
                lookup.rows(&batch.columns[lookup.column], rows);
            }
            let indices: Vec<&[u32]> = indices.iter().map(Vec::as_slice).collect();
            let feed = ProgramFeed { rows: batch.rows, inputs: &inputs, indices: &indices };
            self.program.run(&feed, Isa::best())
        })
    }
}

impl Lookup {
    fn rows(&self, column: &ColumnData, rows: &mut Vec<u32>) {
        let ColumnData::Ids(ids) = column else {
            unreachable!("a numeric column has no ids");
        };
        let row = |id: u64| (if self.hashed { mix64(id) } else { id } % self.entries) as u32;
        rows.clear();
        rows.reserve(ids.len());
        // Many columns have one id for all candidates of a request, so the last row often fits.
        let mut last = None;
        for &id in ids {
            let row = match last {
                Some((last_id, row)) if last_id == id => row,
                _ => row(id),
            };
            last = Some((id, row));
            rows.push(row);
        }
    }
}

/// Splits `[rows, sum of widths]` into one `[rows, width]` for each width.
fn columns_of(values: &[f32], widths: &[usize], rows: usize) -> Vec<Vec<f32>> {
    let all: usize = widths.iter().sum();
    let mut from = 0;
    let cut = |width: &usize| {
        let start = from;
        from += width;
        (0..rows).flat_map(|row| values[row * all + start..][..*width].iter().copied()).collect()
    };
    widths.iter().map(cut).collect()
}

/// The part of a graph that the nodes `outputs` depend on; they become its outputs.
fn pruned(graph: &ExpertGraph, outputs: &[usize]) -> ExpertGraph {
    let needed = reach(graph, outputs);
    let mut new_index = vec![0; graph.nodes.len()];
    let mut nodes = Vec::new();
    for (at, node) in graph.nodes.iter().enumerate().filter(|(at, _)| needed[*at]) {
        new_index[at] = nodes.len();
        let inputs = node.inputs.iter().map(|input| new_index[*input]).collect();
        nodes.push(Node { inputs, ..node.clone() });
    }
    let outputs = outputs.iter().map(|output| new_index[*output]).collect();
    ExpertGraph { nodes, outputs, extra_loss: None, ..graph.clone() }
}

/// Whether each node is in `from`, or some node in `from` depends on it.
fn reach(graph: &ExpertGraph, from: &[usize]) -> Vec<bool> {
    let mut needed = vec![false; graph.nodes.len()];
    for node in from {
        needed[*node] = true;
    }
    for at in (0..graph.nodes.len()).rev() {
        if needed[at] {
            graph.nodes[at].inputs.iter().for_each(|input| needed[*input] = true);
        }
    }
    needed
}

struct Compiler<'a> {
    graph: &'a ExpertGraph,
    parameters: &'a Parameters,
    /// Whether an output depends on the node.
    needed: Vec<bool>,
    /// The needed nodes that read each node.
    readers: Vec<Vec<usize>>,
    /// Each node's operand in the program; none for a node that stays with the executor.
    compiled: Vec<Option<Operand>>,
    steps: Vec<ProgramStep>,
    constants: Vec<Vec<f32>>,
    columns: Vec<usize>,
    /// For each column of the batch that is a feature, its place in the block of features.
    features: Vec<Option<usize>>,
    lookups: Vec<Lookup>,
    /// Nodes of the executor that the program reads, in the order of the program's inputs.
    rest: Vec<usize>,
}

impl<'a> Compiler<'a> {
    fn new(graph: &'a ExpertGraph, parameters: &'a Parameters) -> Self {
        let needed = reach(graph, &graph.outputs);
        let mut readers = vec![Vec::new(); graph.nodes.len()];
        for (at, node) in graph.nodes.iter().enumerate().filter(|(at, _)| needed[*at]) {
            node.inputs.iter().for_each(|input| readers[*input].push(at));
        }
        let mut places = 0..;
        let place = |column: &Column| match column {
            Column::Feature(_) => places.next(),
            _ => None,
        };
        let features: Vec<Option<usize>> = graph.columns.iter().map(place).collect();
        // The inputs of a run are all columns that any node reads, the block of features, then the
        // executor's results. Counting the former first gives the latter their places.
        let column = |node: &Node| match node.op {
            Op::Input { column } if node.ty == Type::Number && features[column].is_none() => {
                Some(column)
            }
            _ => None,
        };
        let mut columns: Vec<usize> = graph.nodes.iter().filter_map(column).collect();
        columns.sort_unstable();
        columns.dedup();
        Self {
            graph,
            parameters,
            readers,
            compiled: vec![None; graph.nodes.len()],
            needed,
            steps: Vec::new(),
            constants: Vec::new(),
            columns,
            features,
            lookups: Vec::new(),
            rest: Vec::new(),
        }
    }

    /// A node as an operand: a node that stays with the executor becomes an input.
    fn operand(&mut self, node: usize) -> Operand {
        if let Some(operand) = self.compiled[node] {
            return operand;
        }
        if let Some(place) = self.feature(node) {
            let operand = self.features(place, 1);
            self.compiled[node] = Some(operand);
            return operand;
        }
        let place = index_or_push(&mut self.rest, node);
        let width = self.graph.nodes[node].shape.dims[0];
        Operand::Input { index: self.columns.len() + 1 + place, width }
    }

    /// A node's place in the block of features, if it is a feature.
    fn feature(&self, node: usize) -> Option<usize> {
        match self.graph.nodes[node].op {
            Op::Input { column } => self.features[column],
            _ => None,
        }
    }

    /// `width` columns of the block of features.
    fn features(&mut self, first: usize, width: usize) -> Operand {
        let all = self.features.iter().flatten().count();
        let block = Operand::Input { index: self.columns.len(), width: all };
        if width == all { block } else { self.step(RowOperator::Slice(first), vec![block], width) }
    }

    /// The operands of a concatenation: features that are neighbours in their block become one.
    fn side_by_side(&mut self, nodes: &[usize]) -> Vec<Operand> {
        let mut operands = Vec::new();
        let mut rest = nodes;
        while let [first, ..] = rest {
            let place = self.feature(*first);
            let follows = |(at, node): (usize, &usize)| {
                place.is_some_and(|place| self.feature(*node) == Some(place + at))
            };
            let run = rest.iter().enumerate().position(|node| !follows(node)).unwrap_or(rest.len());
            operands.push(match place {
                Some(place) => self.features(place, run),
                None => self.operand(*first),
            });
            rest = &rest[run.max(1)..];
        }
        operands
    }

    /// Compiles a node; none if it has to stay with the executor.
    fn node(&mut self, at: usize) -> Option<Operand> {
        let node = &self.graph.nodes[at];
        if !flat(node) {
            return None;
        }
        let width = node.shape.dims[0];
        let numbers: Vec<usize> = node
            .inputs
            .iter()
            .copied()
            .filter(|input| self.graph.nodes[*input].ty == Type::Number)
            .collect();
        match &node.op {
            // Features become operands when they are read, most of them several at once.
            Op::Input { column } => {
                let index = self.columns.binary_search(column).ok()?;
                return Some(Operand::Input { index, width });
            }
            Op::Parameter { parameter } => {
                return Some(self.constant(self.parameters.values(*parameter).to_vec()));
            }
            Op::Constant { value, .. } => return Some(self.constant(vec![*value; width])),
            Op::MatMul => return self.linear(at, &numbers),
            Op::EmbeddingBag | Op::Gather => return self.lookup(node),
            _ => {}
        }
        // A reader of a node that is not `[rows, width]` stays with the executor, too.
        if !numbers.iter().all(|input| self.readable(*input)) {
            return None;
        }
        if let Some(done) = self.biased(node) {
            return Some(done);
        }
        let lead = usize::from(node.shape.lead.is_some());
        let operator = match &node.op {
            Op::Dropout { .. } | Op::StopGradient => return Some(self.operand(numbers[0])),
            Op::Reshape { .. } => {
                let same = self.graph.nodes[numbers[0]].shape == node.shape;
                return same.then(|| self.operand(numbers[0]));
            }
            Op::Unary(op) => RowOperator::Map(map(*op)?),
            Op::Clip { min, max } => RowOperator::Map(Map::Clip(*min, *max)),
            Op::Binary(op) | Op::Compare(op) => RowOperator::Zip(*op),
            Op::Where => RowOperator::Select,
            Op::Concat { axis } if *axis == lead => {
                let operands = self.side_by_side(&numbers);
                return Some(match operands[..] {
                    [all] => all,
                    _ => self.step(RowOperator::Concat, operands, width),
                });
            }
            Op::Slice { axis, start, .. } if *axis == lead => RowOperator::Slice(*start),
            Op::Softmax { axis } if *axis == lead => RowOperator::Softmax,
            Op::Reduce { kind, axis } if *axis == lead => RowOperator::Fold(*kind),
            Op::LayerNormalization { epsilon } => {
                let fixed = |input: &usize| self.graph.nodes[*input].shape.lead.is_none();
                if !numbers[1..].iter().all(fixed) {
                    return None;
                }
                RowOperator::Norm { epsilon: *epsilon }
            }
            _ => return None,
        };
        let operands = numbers.iter().map(|input| self.operand(*input)).collect();
        Some(self.step(operator, operands, width))
    }

    fn constant(&mut self, values: Vec<f32>) -> Operand {
        let operand = Operand::Constant { index: self.constants.len(), width: values.len() };
        self.constants.push(values);
        operand
    }

    fn step(&mut self, operator: RowOperator, operands: Vec<Operand>, width: usize) -> Operand {
        self.steps.push(ProgramStep { operator, operands, width });
        Operand::Value { step: self.steps.len() - 1, width }
    }

    /// Whether a node can be an operand.
    fn readable(&self, node: usize) -> bool {
        let by_rows = |node: &Node| node.shape.lead == Some(Lead::Rows) && flat(node);
        self.compiled[node].is_some() || by_rows(&self.graph.nodes[node])
    }

    /// A product with a parameter, with the bias that is added to it.
    fn linear(&mut self, at: usize, inputs: &[usize]) -> Option<Operand> {
        let right = &self.graph.nodes[inputs[1]];
        let Op::Parameter { parameter } = right.op else { return None };
        let [from, to] = right.shape.dims[..] else { return None };
        if !self.readable(inputs[0]) {
            return None;
        }
        let weights = self.parameters.values(parameter);
        let bias = self.bias(at, to).map_or(&[][..], |bias| self.parameters.values(bias));
        let operator = match to {
            1 => RowOperator::Dot {
                weights: weights.to_vec(),
                bias: bias.first().copied().unwrap_or(0.0),
            },
            _ => RowOperator::Linear(Prepared::new(
                StridedRows { data: weights, stride: to },
                [from, to],
                bias,
            )),
        };
        let operands = vec![self.operand(inputs[0])];
        Some(self.step(operator, operands, to))
    }

    /// The parameter that a product's only reader adds to it.
    fn bias(&self, product: usize, width: usize) -> Option<usize> {
        let [reader] = self.readers[product][..] else { return None };
        let node = &self.graph.nodes[reader];
        if node.op != Op::Binary(Zip::Add) || self.graph.outputs.contains(&product) {
            return None;
        }
        let other = node.inputs.iter().find(|input| **input != product)?;
        let other = &self.graph.nodes[*other];
        match other.op {
            Op::Parameter { parameter } if other.shape.dims == [width] => Some(parameter),
            _ => None,
        }
    }

    /// The product that already includes this addition as its bias.
    fn biased(&self, node: &Node) -> Option<Operand> {
        let is_product = |input: &&usize| {
            let input = **input;
            self.graph.nodes[input].op == Op::MatMul
                && self.compiled[input].is_some()
                && self.bias(input, node.shape.dims[0]).is_some()
        };
        match node.op {
            Op::Binary(Zip::Add) => {
                node.inputs.iter().find(is_product).and_then(|input| self.compiled[*input])
            }
            _ => None,
        }
    }

    /// A lookup of table rows by the ids of a column.
    fn lookup(&mut self, node: &Node) -> Option<Operand> {
        let [table, ids] = node.inputs[..] else { return None };
        let (table, ids) = (&self.graph.nodes[table], &self.graph.nodes[ids]);
        let (Op::Parameter { parameter }, Op::Input { column }) = (&table.op, &ids.op) else {
            return None;
        };
        if ids.shape.lead != Some(Lead::Rows) {
            return None;
        }
        let hashed = node.op == Op::EmbeddingBag;
        let lookup = Lookup { column: *column, entries: table.shape.dims[0] as u64, hashed };
        let index = index_or_push(&mut self.lookups, lookup);
        let table = self.parameters.shared_values(*parameter);
        let operator = RowOperator::Lookup { table, index, bag: ids.shape.row_elements() };
        Some(self.step(operator, Vec::new(), node.shape.dims[0]))
    }
}

/// The index of `value` in `list`, where it is added if it is new.
fn index_or_push<T: PartialEq>(list: &mut Vec<T>, value: T) -> usize {
    list.iter().position(|known| *known == value).unwrap_or_else(|| {
        list.push(value);
        list.len() - 1
    })
}

/// Whether a node's value is `[rows, width]` or `[width]`.
fn flat(node: &Node) -> bool {
    node.shape.lead != Some(Lead::History) && node.shape.dims.len() == 1
}

fn map(op: Unary) -> Option<Map> {
    Some(match op {
        Unary::Exp => Map::Exp,
        Unary::Log => Map::Log,
        Unary::Sqrt => Map::Sqrt,
        Unary::Neg => Map::Neg,
        Unary::Abs => Map::Abs,
        Unary::Sigmoid => Map::Sigmoid,
        Unary::Silu => Map::Silu,
        Unary::Relu => Map::Relu,
        Unary::Tanh => Map::Tanh,
        Unary::Softplus => Map::Softplus,
        Unary::Gelu => return None,
    })
}
