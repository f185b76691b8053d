//! A plain f64 evaluator of graphs: nested loops over indices, without a tensor library. Slow and
//! simple, to compare the executor with.

use hypercast_core::hash::mix64;

use crate::batch::{ColumnData, ExpertBatch};
use crate::graph::{ExpertGraph, Fold, Lead, Node, Op, Type, Unary, Zip};

/// A dense value in f64.
#[derive(Clone, Debug, Default)]
pub(super) struct Array {
    pub(super) dims: Vec<usize>,
    pub(super) data: Vec<f64>,
}

impl Array {
    fn fill(dims: Vec<usize>, f: impl FnMut(&[usize]) -> f64) -> Array {
        let data = indices(&dims).iter().map(|index| index.as_slice()).map(f).collect();
        Array { dims, data }
    }

    /// The value at `index`, aligned from the right, with size 1 broadcast.
    fn at(&self, index: &[usize]) -> f64 {
        let index = &index[index.len() - self.dims.len()..];
        let flat = index
            .iter()
            .zip(&self.dims)
            .fold(0, |flat, (i, dim)| flat * dim + if *dim == 1 { 0 } else { *i });
        self.data[flat]
    }
}

fn indices(dims: &[usize]) -> Vec<Vec<usize>> {
    dims.iter().fold(vec![vec![]], |prefixes, dim| {
        let extend = |prefix: &Vec<usize>| {
            (0..*dim).map(|i| [prefix.as_slice(), &[i]].concat()).collect::<Vec<_>>()
        };
        prefixes.iter().flat_map(extend).collect()
    })
}

/// Every node's value, with `parameters` in place of the graph's.
pub(super) fn evaluate(
    graph: &ExpertGraph,
    parameters: &[Vec<f64>],
    batch: &ExpertBatch,
) -> Vec<Array> {
    let mut values: Vec<Array> = Vec::new();
    for node in &graph.nodes {
        let lead = node.shape.lead.map(|lead| match lead {
            Lead::Rows => batch.rows,
            Lead::History => batch.history_events().max(1),
        });
        let dims: Vec<usize> = lead.into_iter().chain(node.shape.dims.clone()).collect();
        let value = evaluate_node(node, dims, &values, parameters, batch);
        values.push(value);
    }
    values
}

fn evaluate_node(
    node: &Node,
    dims: Vec<usize>,
    values: &[Array],
    parameters: &[Vec<f64>],
    batch: &ExpertBatch,
) -> Array {
    let x = |input: usize| &values[node.inputs[input]];
    let with = |index: &[usize], axis: usize, value: usize| {
        let mut index = index.to_vec();
        index[axis] = value;
        index
    };
    match &node.op {
        Op::Input { column } => {
            let data = match &batch.columns[*column] {
                ColumnData::Ids(values) => values.iter().map(|id| *id as f64).collect(),
                _ => batch.numbers(*column).iter().map(|value| f64::from(*value)).collect(),
            };
            Array { dims, data }
        }
        Op::Parameter { parameter } => Array { dims, data: parameters[*parameter].clone() },
        Op::Constant { value, .. } => Array::fill(dims, |_| f64::from(*value)),
        Op::MatMul => {
            let k = x(1).dims[0];
            let term = |i: &[usize], j: usize| {
                x(0).at(&with(i, i.len() - 1, j)) * x(1).at(&[j, i[i.len() - 1]])
            };
            Array::fill(dims, |i| (0..k).map(|j| term(i, j)).sum())
        }
        Op::Binary(op) | Op::Compare(op) => Array::fill(dims, |i| zip(*op, x(0).at(i), x(1).at(i))),
        Op::Unary(op) => Array::fill(dims, |i| unary(*op, x(0).at(i))),
        Op::Clip { min, max } => {
            Array::fill(dims, |i| x(0).at(i).clamp(f64::from(*min), f64::from(*max)))
        }
        Op::Where => Array::fill(dims, |i| if x(0).at(i) != 0.0 { x(1).at(i) } else { x(2).at(i) }),
        Op::Softmax { axis } => {
            let n = dims[*axis];
            let total =
                |i: &[usize]| (0..n).map(|j| x(0).at(&with(i, *axis, j)).exp()).sum::<f64>();
            Array::fill(dims, |i| x(0).at(i).exp() / total(i))
        }
        Op::Concat { axis } => Array::fill(dims, |i| {
            let mut position = i[*axis];
            let mut part = 0;
            while position >= x(part).dims[*axis] {
                position -= x(part).dims[*axis];
                part += 1;
            }
            x(part).at(&with(i, *axis, position))
        }),
        Op::Slice { axis, start, .. } => {
            Array::fill(dims, |i| x(0).at(&with(i, *axis, i[*axis] + start)))
        }
        Op::Reshape { .. } => Array { dims, data: x(0).data.clone() },
        Op::Transpose { perm } => Array::fill(dims, |i| {
            let mut source = vec![0; i.len()];
            perm.iter().zip(i).for_each(|(axis, at)| source[*axis] = *at);
            x(0).at(&source)
        }),
        Op::Gather => {
            Array::fill(dims, |i| x(0).at(&[x(1).data[i[0]] as usize % x(0).dims[0], i[1]]))
        }
        Op::EmbeddingBag => {
            let (n, k) = (x(0).dims[0] as u64, x(1).dims[1]);
            let row = |s: usize, j: usize| (mix64(x(1).at(&[s, j]) as u64) % n) as usize;
            Array::fill(dims, |i| {
                (0..k).map(|j| x(0).at(&[row(i[0], j), i[1]])).sum::<f64>() / k as f64
            })
        }
        Op::Reduce { kind, axis } => {
            let n = x(0).dims[*axis];
            Array::fill(dims, |i| reduce(*kind, (0..n).map(|j| x(0).at(&with(i, *axis, j)))))
        }
        Op::LayerNormalization { epsilon } => {
            let d = dims[dims.len() - 1];
            Array::fill(dims, |i| {
                let axis = i.len() - 1;
                let row: Vec<f64> = (0..d).map(|j| x(0).at(&with(i, axis, j))).collect();
                let mean = row.iter().sum::<f64>() / d as f64;
                let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
                (x(0).at(i) - mean) / (variance + f64::from(*epsilon)).sqrt() * x(1).at(i)
                    + x(2).at(i)
            })
        }
        Op::Dropout { .. } | Op::StopGradient | Op::Cast => x(0).clone(),
        Op::HstuAttention { heads, max_len } => {
            let (q, k, v) = (x(3), x(4), x(5));
            Array::fill(dims, |i| {
                let request = owner(&batch.target_offsets, i[0]);
                let history = batch.history_offsets[request] as usize
                    ..batch.history_offsets[request + 1] as usize;
                let head = Head { d: q.dims[1] / heads, column: i[1], norm: *max_len as f64 };
                let past: f64 = history.map(|j| head.term(q, i[0], x(1), x(2), j)).sum();
                past + head.term(q, i[0], k, v, i[0])
            })
        }
        Op::HstuHistory { heads, max_len } => Array::fill(dims, |i| {
            if batch.history_events() == 0 {
                return 0.0;
            }
            let start = batch.history_offsets[owner(&batch.history_offsets, i[0])] as usize;
            let head = Head { d: x(0).dims[1] / heads, column: i[1], norm: *max_len as f64 };
            (start..=i[0]).map(|j| head.term(x(0), i[0], x(1), x(2), j)).sum()
        }),
        Op::Pool(kind) => Array::fill(dims, |i| {
            let request = owner(&batch.target_offsets, i[0]);
            let history = batch.history_offsets[request] as usize
                ..batch.history_offsets[request + 1] as usize;
            if history.is_empty() {
                0.0
            } else {
                reduce(*kind, history.map(|j| x(0).at(&[j, i[1]])))
            }
        }),
    }
}

struct Head {
    d: usize,
    column: usize,
    norm: f64,
}

impl Head {
    /// What key `j` adds to query `i`.
    fn term(&self, q: &Array, i: usize, k: &Array, v: &Array, j: usize) -> f64 {
        let first = self.column / self.d * self.d;
        let dot: f64 = (first..first + self.d).map(|c| q.at(&[i, c]) * k.at(&[j, c])).sum();
        unary(Unary::Silu, dot / (self.d as f64).sqrt()) / self.norm * v.at(&[j, self.column])
    }
}

fn owner(offsets: &[u32], entry: usize) -> usize {
    (0..offsets.len() - 1)
        .find(|r| entry < offsets[r + 1] as usize)
        .expect("the entry is in a request")
}

fn reduce(kind: Fold, values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len() as f64;
    match kind {
        Fold::Sum => values.sum(),
        Fold::Mean => values.sum::<f64>() / n,
        Fold::Max => values.fold(f64::NEG_INFINITY, f64::max),
    }
}

fn zip(op: Zip, a: f64, b: f64) -> f64 {
    match op {
        Zip::Add => a + b,
        Zip::Sub => a - b,
        Zip::Mul => a * b,
        Zip::Div => a / b,
        Zip::Max => a.max(b),
        Zip::Min => a.min(b),
        Zip::Greater => f64::from(a > b),
        Zip::Less => f64::from(a < b),
        Zip::Equal => f64::from(a == b),
    }
}

fn unary(op: Unary, x: f64) -> f64 {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    match op {
        Unary::Exp => x.exp(),
        Unary::Log => x.max(1e-12).ln(),
        Unary::Sqrt => x.max(1e-12).sqrt(),
        Unary::Neg => -x,
        Unary::Abs => x.abs(),
        Unary::Sigmoid => sigmoid,
        Unary::Silu => x * sigmoid,
        Unary::Relu => x.max(0.0),
        Unary::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Unary::Tanh => x.tanh(),
        Unary::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
    }
}

/// Its Taylor series, enough for the small arguments of the tests.
fn erf(x: f64) -> f64 {
    let mut term = x;
    let mut sum = x;
    for n in 1..60 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

/// The outputs `[rows, tasks]`.
pub(super) fn outputs(
    graph: &ExpertGraph,
    parameters: &[Vec<f64>],
    batch: &ExpertBatch,
) -> Vec<f64> {
    let values = evaluate(graph, parameters, batch);
    assert!(graph.outputs.iter().all(|node| graph.nodes[*node].ty == Type::Number));
    let row = |row: usize| {
        graph.outputs.iter().map(move |node| row * 1_000_000 + node).collect::<Vec<_>>()
    };
    (0..batch.rows).flat_map(row).map(|key| values[key % 1_000_000].data[key / 1_000_000]).collect()
}
