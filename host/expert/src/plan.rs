//! What of a network becomes a program for serving on the CPU, decided from the graph alone: its
//! memory is known before any parameter is allocated.
//!
//! All nodes that work row by row become steps. The other nodes (short histories, tensors of higher
//! rank) stay with the executor, and the program reads their results as inputs.

use std::sync::Arc;

use hypercast_kernels::cpu::program::{Map, Operand, Program, ProgramStep, RowOperator};
use hypercast_kernels::cpu::{Prepared, StridedRows};

use super::graph::{ExpertGraph, Lead, Node, Op, Type, Unary, Zip};
use super::params::Parameters;
use super::wasm::contract::Column;

/// A network's program, what it reads, and what stays with the executor.
pub(super) struct NetworkPlan {
    pub(super) program: PlannedProgram,
    /// Columns of the batch that are the program's first inputs; the block of features follows.
    pub(super) columns: Vec<usize>,
    /// The lists of table rows that the program reads.
    pub(super) lookups: Vec<Lookup>,
    /// Nodes of the executor that the program reads, in the order of the program's inputs.
    pub(super) rest: Vec<usize>,
}

/// How the ids of a column become rows of a table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Lookup {
    pub(super) column: usize,
    pub(super) entries: u64,
    pub(super) hashed: bool,
    /// Ids a row.
    pub(super) bag: usize,
}

/// A program without its weights.
pub(super) struct PlannedProgram {
    steps: Vec<ProgramStep<PlannedOperator>>,
    constants: Vec<PlannedConstant>,
    outputs: Vec<Operand>,
}

/// An operator whose weights are named by their parameter.
enum PlannedOperator {
    /// A product with a matrix, and the vector that is added.
    Product { parameter: usize, bias: Option<usize>, from: usize, to: usize },
    /// The mean of up to `bag` rows of a table.
    Lookup { parameter: usize, index: usize, bag: usize },
    /// An operator without weights.
    Other(RowOperator),
}

/// The values of a constant of the program.
#[derive(PartialEq)]
enum PlannedConstant {
    Parameter(usize),
    Filled { value: f32, width: usize },
}

impl NetworkPlan {
    /// Plans the serving of a checked graph.
    pub(super) fn new(graph: &ExpertGraph) -> Self {
        let mut planner = Planner::new(graph);
        for at in 0..graph.nodes.len() {
            if planner.needed[at] && graph.nodes[at].ty == Type::Number {
                planner.planned[at] = planner.node(at);
            }
        }
        let predicted = graph.predicted();
        let outputs = predicted.iter().map(|output| planner.operand(*output)).collect();
        let Planner { steps, constants, columns, lookups, rest, .. } = planner;
        let program = PlannedProgram { steps, constants, outputs };
        NetworkPlan { program, columns, lookups, rest }
    }
}

impl PlannedProgram {
    /// The program with the weights in `parameters`.
    pub(super) fn with(self, parameters: &Parameters) -> Program {
        let steps = self.steps.into_iter().map(|ProgramStep { operator, operands, width }| {
            ProgramStep { operator: operator.with(parameters), operands, width }
        });
        let constants = self.constants.iter().map(|constant| match constant {
            PlannedConstant::Parameter(index) => parameters.shared_values(*index),
            PlannedConstant::Filled { value, width } => Arc::new(vec![*value; *width]),
        });
        Program::new(steps.collect(), constants.collect(), self.outputs)
    }

    /// The size in bytes of what the program holds besides the parameters: its laid-out weights and
    /// filled constants.
    pub(super) fn compiled_bytes(&self) -> u64 {
        let constants = self.constants.iter().map(|constant| match constant {
            PlannedConstant::Parameter(_) => 0,
            PlannedConstant::Filled { width, .. } => 4 * *width as u64,
        });
        let steps = self.steps.iter().map(|step| match step.operator {
            PlannedOperator::Product { from, to: 1, .. } => 4 * from as u64,
            PlannedOperator::Product { from, to, .. } => Prepared::bytes(from, to),
            PlannedOperator::Lookup { .. } | PlannedOperator::Other(_) => 0,
        });
        steps.chain(constants).fold(0, u64::saturating_add)
    }

    /// The size in bytes of the scratch buffer that each thread keeps.
    pub(super) fn scratch_bytes(&self) -> u64 {
        Program::scratch_bytes(&self.steps, &self.outputs)
    }

    /// The most bytes that a run takes for what it computes once.
    pub(super) fn once_bytes(&self) -> u64 {
        Program::once_bytes(&self.steps)
    }
}

impl PlannedOperator {
    fn with(self, parameters: &Parameters) -> RowOperator {
        match self {
            PlannedOperator::Product { parameter, bias, from, to } => {
                let weights = parameters.values(parameter);
                let bias = bias.map_or(&[][..], |bias| parameters.values(bias));
                if to == 1 {
                    let bias = bias.first().copied().unwrap_or(0.0);
                    return RowOperator::Dot { weights: weights.to_vec(), bias };
                }
                let rows = StridedRows { data: weights, stride: to };
                RowOperator::Linear(Prepared::new(rows, [from, to], bias))
            }
            PlannedOperator::Lookup { parameter, index, bag } => {
                RowOperator::Lookup { table: parameters.shared_values(parameter), index, bag }
            }
            PlannedOperator::Other(operator) => operator,
        }
    }
}

/// Whether each node is in `from`, or some node in `from` depends on it.
pub(super) fn reach(graph: &ExpertGraph, from: &[usize]) -> Vec<bool> {
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

/// Whether a gradient comes to each node: it depends on a parameter that learns, and by more than
/// comparisons and conditions.
pub(super) fn has_gradient(graph: &ExpertGraph) -> Vec<bool> {
    let mut has_gradient = vec![false; graph.nodes.len()];
    for (at, node) in graph.nodes.iter().enumerate() {
        has_gradient[at] = match node.op {
            Op::Parameter { parameter } => graph.parameters[parameter].learns(),
            Op::Compare(_) | Op::SegmentRank | Op::StopGradient => false,
            Op::Where => node.inputs[1..].iter().any(|input| has_gradient[*input]),
            _ => node.inputs.iter().any(|input| has_gradient[*input]),
        };
    }
    has_gradient
}

struct Planner<'a> {
    graph: &'a ExpertGraph,
    /// Whether an output depends on the node.
    needed: Vec<bool>,
    /// The needed nodes that read each node.
    readers: Vec<Vec<usize>>,
    /// Each node's operand in the program; none for a node that stays with the executor.
    planned: Vec<Option<Operand>>,
    steps: Vec<ProgramStep<PlannedOperator>>,
    constants: Vec<PlannedConstant>,
    columns: Vec<usize>,
    /// For each column of the batch that is a feature, its place in the block of features.
    features: Vec<Option<usize>>,
    lookups: Vec<Lookup>,
    /// Nodes of the executor that the program reads, in the order of the program's inputs.
    rest: Vec<usize>,
}

impl<'a> Planner<'a> {
    fn new(graph: &'a ExpertGraph) -> Self {
        let needed = reach(graph, &graph.predicted());
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
            readers,
            planned: vec![None; graph.nodes.len()],
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
        if let Some(operand) = self.planned[node] {
            return operand;
        }
        if let Some(place) = self.feature(node) {
            let operand = self.features(place, 1);
            self.planned[node] = Some(operand);
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
                return Some(self.constant(PlannedConstant::Parameter(*parameter), width));
            }
            Op::Constant { value, .. } => {
                return Some(
                    self.constant(PlannedConstant::Filled { value: *value, width }, width),
                );
            }
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

    fn constant(&mut self, constant: PlannedConstant, width: usize) -> Operand {
        Operand::Constant { index: index_or_push(&mut self.constants, constant), width }
    }

    fn step(&mut self, operator: RowOperator, operands: Vec<Operand>, width: usize) -> Operand {
        self.planned_step(PlannedOperator::Other(operator), operands, width)
    }

    fn planned_step(
        &mut self,
        operator: PlannedOperator,
        operands: Vec<Operand>,
        width: usize,
    ) -> Operand {
        self.steps.push(ProgramStep { operator, operands, width });
        Operand::Value { step: self.steps.len() - 1, width }
    }

    /// Whether a node can be an operand.
    fn readable(&self, node: usize) -> bool {
        let by_rows = |node: &Node| node.shape.lead == Some(Lead::Rows) && flat(node);
        self.planned[node].is_some() || by_rows(&self.graph.nodes[node])
    }

    /// A product with a parameter, with the bias that is added to it.
    fn linear(&mut self, at: usize, inputs: &[usize]) -> Option<Operand> {
        let right = &self.graph.nodes[inputs[1]];
        let Op::Parameter { parameter } = right.op else { return None };
        let [from, to] = right.shape.dims[..] else { return None };
        if !self.readable(inputs[0]) {
            return None;
        }
        let bias = self.bias(at, to);
        let operator = PlannedOperator::Product { parameter, bias, from, to };
        let operands = vec![self.operand(inputs[0])];
        Some(self.planned_step(operator, operands, to))
    }

    /// The parameter that a product's only reader adds to it.
    fn bias(&self, product: usize, width: usize) -> Option<usize> {
        let [reader] = self.readers[product][..] else { return None };
        let node = &self.graph.nodes[reader];
        if node.op != Op::Binary(Zip::Add) || self.graph.predicted().contains(&product) {
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
                && self.planned[input].is_some()
                && self.bias(input, node.shape.dims[0]).is_some()
        };
        match node.op {
            Op::Binary(Zip::Add) => {
                node.inputs.iter().find(is_product).and_then(|input| self.planned[*input])
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
        let (parameter, bag) = (*parameter, ids.shape.row_elements());
        let lookup = Lookup { column: *column, entries: table.shape.dims[0] as u64, hashed, bag };
        let index = index_or_push(&mut self.lookups, lookup);
        let operator = PlannedOperator::Lookup { parameter, index, bag };
        Some(self.planned_step(operator, Vec::new(), node.shape.dims[0]))
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
