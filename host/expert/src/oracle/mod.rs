//! A plain evaluator of graphs in f64, with derivatives: loops over indices, without a tensor
//! library. Slow and simple, to compare what serves and what trains with.
//!
//! `array` moves values, `estimate` says how far f32 may be from each number, `tape` computes
//! derivatives. [`compare`] runs a graph in every way there is and compares all results.

mod array;
mod compare;
mod estimate;
mod segments;
mod tape;

use hypercast_core::hash::mix64;
use rand::RngCore;
use rand::rngs::SmallRng;

use crate::batch::{ABSENT, ColumnData, ExpertBatch, or_zero};
use crate::graph::{ExpertGraph, Fold, Lead, Node, Op, Type, Unary, Zip};
use crate::plan::reach;
use crate::train::OutputGradients;
use array::{Array, moved, with};
use tape::{Tape, Traced};

pub use compare::{Compared, Comparison, compare, whole_gradients};
pub use estimate::Estimate;

/// `Log` and `Sqrt` raise smaller inputs to this value.
const TINY: f64 = 1e-12f32 as f64;

/// The value of a node.
#[derive(Default)]
enum NodeValue {
    /// No output depends on it.
    #[default]
    Unread,
    Ids(Array<u64>),
    Numbers(Array<Traced>),
}

/// A graph's outputs for a batch, from which derivatives can be computed.
pub struct Evaluation {
    tape: Tape,
    parameters: Vec<Vec<Traced>>,
    /// `[rows, tasks]`
    outputs: Vec<Traced>,
    /// `[rows, graph.predicted()]`; empty with dropout.
    predicted: Vec<Traced>,
    /// `[rows, losses]`, as [`ExpertGraph::loss_nodes`] has them.
    losses: Vec<Traced>,
}

impl Evaluation {
    /// Runs `graph` with `parameters` in place of its own. Dropout is active if `dropout` is given,
    /// and draws what training draws.
    pub fn new(
        graph: &ExpertGraph,
        parameters: &[Vec<f64>],
        batch: &ExpertBatch,
        dropout: Option<&mut SmallRng>,
    ) -> Evaluation {
        let tape = Tape::default();
        let leaves = |values: &Vec<f64>| values.iter().map(|value| tape.leaf(*value)).collect();
        let parameters: Vec<Vec<Traced>> = parameters.iter().map(leaves).collect();
        // A step of training, with dropout, computes no scores.
        let predicted = if dropout.is_some() { Vec::new() } else { graph.predicted() };
        let needed = reach(graph, &[graph.ends(), predicted.clone()].concat());
        let mut run =
            Run { tape: &tape, parameters: &parameters, batch, dropout, values: Vec::new() };
        for (node, needed) in graph.nodes.iter().zip(needed) {
            let value = if needed { run.node(node) } else { NodeValue::Unread };
            run.values.push(value);
        }
        let beside = |nodes: &[usize]| -> Vec<Traced> {
            let row = |row: usize| nodes.iter().map(move |node| (*node, row));
            let all = (0..batch.rows).flat_map(row);
            all.map(|(node, row)| run.numbers(node).data[row]).collect()
        };
        let (outputs, losses) = (beside(&graph.outputs), beside(&graph.loss_nodes()));
        let predicted = beside(&predicted);
        Evaluation { tape, parameters, outputs, predicted, losses }
    }

    /// The outputs `[rows, tasks]`.
    pub fn outputs(&self) -> Vec<Estimate> {
        self.outputs.iter().map(|output| output.estimate).collect()
    }

    /// The outputs and ranking scores `[rows, graph.predicted()]`; none with dropout.
    pub fn predicted(&self) -> Vec<Estimate> {
        self.predicted.iter().map(|output| output.estimate).collect()
    }

    /// The losses `[rows, losses]`.
    pub fn losses(&self) -> Vec<Estimate> {
        self.losses.iter().map(|loss| loss.estimate).collect()
    }

    /// The gradient of the loss by each parameter, whose gradients by the outputs are `seed`.
    pub fn gradients(&self, seed: &OutputGradients) -> Vec<Vec<Estimate>> {
        let outputs = self.outputs.iter().zip(&seed.tasks);
        let seeds = outputs.chain(self.losses.iter().zip(&seed.losses));
        let seeds = seeds.map(|(output, seed)| (*output, f64::from(*seed)));
        let derivatives = self.tape.derivatives(seeds);
        let of = |leaves: &Vec<Traced>| leaves.iter().map(|leaf| derivatives.by(*leaf)).collect();
        self.parameters.iter().map(of).collect()
    }
}

/// A run in progress.
struct Run<'a> {
    tape: &'a Tape,
    parameters: &'a [Vec<Traced>],
    batch: &'a ExpertBatch,
    dropout: Option<&'a mut SmallRng>,
    /// Of the nodes so far.
    values: Vec<NodeValue>,
}

impl Run<'_> {
    fn numbers(&self, node: usize) -> &Array<Traced> {
        match &self.values[node] {
            NodeValue::Numbers(numbers) => numbers,
            _ => panic!("node {node} has no numbers"),
        }
    }

    fn ids(&self, node: usize) -> &Array<u64> {
        match &self.values[node] {
            NodeValue::Ids(ids) => ids,
            _ => panic!("node {node} has no ids"),
        }
    }

    fn node(&mut self, node: &Node) -> NodeValue {
        let lead = node.shape.lead.map(|lead| match lead {
            Lead::Rows => self.batch.rows,
            Lead::History => self.batch.history_events().max(1),
        });
        let dims: Vec<usize> = lead.into_iter().chain(node.shape.dims.clone()).collect();
        match (&node.op, node.ty) {
            (Op::Input { column }, Type::Id) => match &self.batch.columns[*column] {
                ColumnData::Ids(ids) => NodeValue::Ids(Array { dims, data: ids.clone() }),
                _ => panic!("column {column} has no ids"),
            },
            (_, Type::Id) => {
                let inputs: Vec<_> = node.inputs.iter().map(|input| self.ids(*input)).collect();
                NodeValue::Ids(moved(node, &dims, &inputs).expect("an operator of ids moves them"))
            }
            (Op::Dropout { rate, per_row }, _) => {
                let mask = self.mask(&dims, *rate, *per_row);
                let x = self.numbers(node.inputs[0]);
                NodeValue::Numbers(match mask {
                    Some(mask) => Array::fill(dims, |i| self.tape.scaled(x.at(i), mask.at(i))),
                    None => x.clone(),
                })
            }
            _ => NodeValue::Numbers(self.number(node, dims)),
        }
    }

    /// What training multiplies the values by; none where dropout is not active.
    fn mask(&mut self, dims: &[usize], rate: f32, per_row: bool) -> Option<Array<f64>> {
        let random = self.dropout.as_mut().filter(|_| rate > 0.0)?;
        let mut dims = dims.to_vec();
        if per_row {
            dims[1..].fill(1);
        }
        let threshold = (f64::from(rate) * 4_294_967_296.0) as u32;
        let kept = f64::from(1.0 / (1.0 - rate));
        let mut draw = || if random.next_u32() >= threshold { kept } else { 0.0 };
        let data = (0..dims.iter().product()).map(|_| draw()).collect();
        Some(Array { dims, data })
    }

    fn number(&self, node: &Node, dims: Vec<usize>) -> Array<Traced> {
        let (tape, batch) = (self.tape, self.batch);
        let x = |input: usize| self.numbers(node.inputs[input]);
        let rounded = |value: f32| Traced::constant(f64::from(value));
        match &node.op {
            Op::Input { column } => {
                let data = batch.numbers(*column).iter().map(|value| rounded(*value)).collect();
                Array { dims, data }
            }
            Op::Parameter { parameter } => {
                Array { dims, data: self.parameters[*parameter].clone() }
            }
            Op::Constant { value, .. } => Array::fill(dims, |_| rounded(*value)),
            Op::Outcome { part, task } => {
                let data = batch.outcome(*part, *task);
                Array { dims, data: data.into_iter().map(rounded).collect() }
            }
            Op::Segment(kind) => segments::fold(tape, &batch.target_offsets, *kind, x(0)),
            Op::SegmentRank => segments::rank(tape, &batch.target_offsets, x(0)),
            Op::SegmentPairSum { functions } => {
                segments::pair_sum(tape, &batch.target_offsets, functions, [x(0), x(1)])
            }
            Op::Cast => {
                let data = self.ids(node.inputs[0]).data.iter();
                Array { dims, data: data.map(|id| rounded(or_zero(*id) as i64 as f32)).collect() }
            }
            Op::MatMul => {
                let k = x(1).dims[0];
                let term = |i: &[usize], j: usize| {
                    (x(0).at(&with(i, i.len() - 1, j)), x(1).at(&[j, i[i.len() - 1]]))
                };
                Array::fill(dims, |i| tape.dot(&(0..k).map(|j| term(i, j)).collect::<Vec<_>>()))
            }
            Op::Binary(op) | Op::Compare(op) => {
                Array::fill(dims, |i| zip(tape, *op, x(0).at(i), x(1).at(i)))
            }
            Op::Unary(op) => Array::fill(dims, |i| unary(tape, *op, x(0).at(i))),
            Op::Clip { min, max } => {
                Array::fill(dims, |i| tape.clip(x(0).at(i), (*min).into(), (*max).into()))
            }
            Op::Where => Array::fill(dims, |i| tape.select(x(0).at(i), x(1).at(i), x(2).at(i))),
            Op::Gather => {
                let (ids, table) = (self.ids(node.inputs[1]), x(0));
                let row = |at: usize| (or_zero(ids.data[at]) % table.dims[0] as u64) as usize;
                Array::fill(dims, |i| table.at(&[row(i[0]), i[1]]))
            }
            Op::EmbeddingBag => {
                let (ids, table) = (self.ids(node.inputs[1]), x(0));
                let row = |id: &u64| (mix64(*id) % table.dims[0] as u64) as usize;
                Array::fill(dims, |i| {
                    let present = ids.row(i[0]).iter().filter(|id| **id != ABSENT);
                    let of: Vec<_> = present.map(|id| table.at(&[row(id), i[1]])).collect();
                    if of.is_empty() { rounded(0.0) } else { tape.mean(&of) }
                })
            }
            Op::Reduce { kind, axis } => {
                let reduced = |fibre: &Vec<usize>| {
                    let values: Vec<_> = fibre.iter().map(|at| x(0).data[*at]).collect();
                    reduce(tape, *kind, &values)
                };
                Array { dims, data: x(0).along(*axis).iter().map(reduced).collect() }
            }
            Op::Softmax { axis } => softmax(tape, x(0), *axis),
            Op::LayerNormalization { epsilon } => {
                let normal = layer_norm(tape, x(0), f64::from(*epsilon));
                Array::fill(dims, |i| tape.add(tape.product(normal.at(i), x(1).at(i)), x(2).at(i)))
            }
            Op::StopGradient => {
                Array { dims, data: x(0).data.iter().map(|x| x.detached()).collect() }
            }
            Op::HstuAttention { heads, max_len } => self.attention(
                HstuKeys { past: [x(1), x(2)], own: Some([x(4), x(5)]) },
                x(3),
                *heads,
                *max_len,
            ),
            Op::HstuHistory { heads, max_len } => {
                self.attention(HstuKeys { past: [x(1), x(2)], own: None }, x(0), *heads, *max_len)
            }
            Op::Pool(kind) => Array::fill(dims, |i| {
                let past = span(&batch.history_offsets, owner(&batch.target_offsets, i[0]));
                let past: Vec<_> = past.map(|event| x(0).at(&[event, i[1]])).collect();
                if past.is_empty() { rounded(0.0) } else { reduce(tape, *kind, &past) }
            }),
            Op::Concat { .. } | Op::Slice { .. } | Op::Reshape { .. } | Op::Transpose { .. } => {
                let inputs: Vec<_> = (0..node.inputs.len()).map(x).collect();
                moved(node, &dims, &inputs).expect("the operator moves values")
            }
            Op::Dropout { .. } => unreachable!("it draws, so it is not here"),
        }
    }

    /// HSTU attention of the queries `q`: rows to their request's history and themselves, or events
    /// to those before them and themselves.
    fn attention(
        &self,
        keys: HstuKeys,
        q: &Array<Traced>,
        heads: usize,
        max_len: usize,
    ) -> Array<Traced> {
        let (tape, batch) = (self.tape, self.batch);
        let width = q.dims[1] / heads;
        let weight = |q: &[Traced], k: &[Traced]| {
            let pairs: Vec<_> = q.iter().copied().zip(k.iter().copied()).collect();
            let logit = tape.scaled(tape.dot(&pairs), 1.0 / (width as f64).sqrt());
            tape.scaled(tape.silu(logit), 1.0 / max_len as f64)
        };
        let mut data = Vec::with_capacity(q.data.len());
        for at in 0..q.dims[0] {
            let past = match (&keys.own, batch.history_events()) {
                (Some(_), _) => span(&batch.history_offsets, owner(&batch.target_offsets, at)),
                (None, 0) => 0..0,
                (None, _) => {
                    span(&batch.history_offsets, owner(&batch.history_offsets, at)).start..at + 1
                }
            };
            let own = keys.own.iter().map(|[k, v]| [k.row(at), v.row(at)]);
            let past = past.map(|event| keys.past.map(|of| of.row(event)));
            let seen: Vec<[&[Traced]; 2]> = past.chain(own).collect();
            for head in (0..heads).map(|head| head * width..(head + 1) * width) {
                let query = &q.row(at)[head.clone()];
                let weights: Vec<Traced> =
                    seen.iter().map(|[k, _]| weight(query, &k[head.clone()])).collect();
                for column in head {
                    let values = seen.iter().map(|[_, v]| v[column]);
                    let pairs: Vec<_> = weights.iter().copied().zip(values).collect();
                    data.push(tape.dot(&pairs));
                }
            }
        }
        Array { dims: q.dims.clone(), data }
    }
}

/// Keys and values that HSTU attends to.
struct HstuKeys<'a> {
    /// Of the history.
    past: [&'a Array<Traced>; 2],
    /// Of the rows, where they attend.
    own: Option<[&'a Array<Traced>; 2]>,
}

fn span(offsets: &[u32], request: usize) -> std::ops::Range<usize> {
    offsets[request] as usize..offsets[request + 1] as usize
}

fn owner(offsets: &[u32], entry: usize) -> usize {
    (0..offsets.len() - 1)
        .find(|r| entry < offsets[r + 1] as usize)
        .expect("the entry is in a request")
}

fn softmax(tape: &Tape, x: &Array<Traced>, axis: usize) -> Array<Traced> {
    let mut result = x.clone();
    for fibre in x.along(axis) {
        let values: Vec<Traced> = fibre.iter().map(|at| x.data[*at]).collect();
        let shift = tape.largest(&values).detached();
        let exp: Vec<Traced> = values.iter().map(|x| tape.exp(tape.sub(*x, shift))).collect();
        let total = tape.sum(&exp);
        fibre.iter().zip(exp).for_each(|(at, e)| result.data[*at] = tape.quotient(e, total));
    }
    result
}

fn layer_norm(tape: &Tape, x: &Array<Traced>, epsilon: f64) -> Array<Traced> {
    let mut result = x.clone();
    for row in x.along(x.dims.len() - 1) {
        let values: Vec<Traced> = row.iter().map(|at| x.data[*at]).collect();
        let mean = tape.mean(&values);
        let centred: Vec<Traced> = values.iter().map(|x| tape.sub(*x, mean)).collect();
        let squares: Vec<Traced> = centred.iter().map(|x| tape.product(*x, *x)).collect();
        let variance = tape.add(tape.mean(&squares), Traced::constant(epsilon));
        let deviation = tape.sqrt(variance);
        let normal = centred.iter().map(|x| tape.quotient(*x, deviation));
        row.iter().zip(normal).for_each(|(at, normal)| result.data[*at] = normal);
    }
    result
}

fn reduce(tape: &Tape, kind: Fold, values: &[Traced]) -> Traced {
    match kind {
        Fold::Sum => tape.sum(values),
        Fold::Mean => tape.mean(values),
        Fold::Max => tape.largest(values),
    }
}

fn zip(tape: &Tape, op: Zip, a: Traced, b: Traced) -> Traced {
    match op {
        Zip::Add => tape.add(a, b),
        Zip::Sub => tape.sub(a, b),
        Zip::Mul => tape.product(a, b),
        Zip::Div => tape.quotient(a, b),
        Zip::Max => tape.largest(&[a, b]),
        Zip::Min => tape.smallest(&[a, b]),
        Zip::Greater => tape.truth(a, b, |difference| difference > 0.0),
        Zip::Less => tape.truth(a, b, |difference| difference < 0.0),
        Zip::Equal => tape.truth(a, b, |difference| difference == 0.0),
    }
}

fn unary(tape: &Tape, op: Unary, x: Traced) -> Traced {
    let at_least = |least: f64| tape.largest(&[x, Traced::constant(least)]);
    match op {
        Unary::Exp => tape.exp(x),
        Unary::Log => tape.ln(at_least(TINY), TINY),
        Unary::Sqrt => tape.sqrt(at_least(TINY)),
        Unary::Neg => tape.neg(x),
        Unary::Abs => tape.abs(x),
        Unary::Sigmoid => tape.sigmoid(x),
        Unary::Silu => tape.silu(x),
        Unary::Relu => at_least(0.0),
        Unary::Gelu => tape.gelu(x),
        Unary::Tanh => tape.tanh(x),
        Unary::Softplus => tape.softplus(x),
    }
}
