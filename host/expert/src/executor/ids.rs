//! Ids and table rows, computed on the host: ids have no gradient and no arithmetic, and the rows
//! that a batch touches must be known before anything is copied to the device.

use hypercast_core::hash::mix64;

use crate::batch::{ABSENT, ColumnData, ExpertBatch, or_zero};
use crate::graph::{ExpertGraph, Node, Op, Type};

/// The row of a value that a feature of several values does not have.
pub(super) const NO_ROW: i64 = -1;

/// The row indices of a batch.
pub struct Lookups {
    /// For each table, the rows that the batch touches, ascending and without repeats. `None` for
    /// dense parameters.
    pub rows: Vec<Option<Vec<u32>>>,
    /// The values of each node of ids.
    ids: Vec<Vec<u64>>,
    /// The rows that each lookup node reads, as rows of its leaf; [`NO_ROW`] for an id that is
    /// absent.
    pub(super) index: Vec<Vec<i64>>,
}

impl Lookups {
    /// Those of the nodes that have readers, of which `uses` has the numbers.
    pub(super) fn new(graph: &ExpertGraph, uses: &[u32], batch: &ExpertBatch) -> Lookups {
        let nodes = &graph.nodes;
        let mut ids: Vec<Vec<u64>> = vec![Vec::new(); nodes.len()];
        let mut index: Vec<Vec<i64>> = vec![Vec::new(); nodes.len()];
        for (at, node) in nodes.iter().enumerate().filter(|(at, _)| uses[*at] > 0) {
            match node.op {
                Op::EmbeddingBag | Op::Gather => {
                    index[at] = row_indices(graph, node, &ids[node.inputs[1]])
                }
                Op::Cast => ids[at] = ids[node.inputs[0]].clone(),
                _ if node.ty == Type::Id => ids[at] = id_values(graph, node, &ids, batch),
                _ => {}
            }
        }
        let rows = touched_rows(graph, &mut index);
        Lookups { rows, ids, index }
    }

    /// The values of a `Cast` node.
    pub(super) fn cast(&self, node: usize) -> Vec<f32> {
        self.ids[node].iter().map(|id| or_zero(*id) as i64 as f32).collect()
    }
}

fn row_indices(graph: &ExpertGraph, node: &Node, ids: &[u64]) -> Vec<i64> {
    let n = graph.nodes[node.inputs[0]].shape.dims[0] as u64;
    let row = |id: &u64| match node.op {
        Op::Gather => (or_zero(*id) % n) as i64,
        _ if *id == ABSENT => NO_ROW,
        _ => (mix64(*id) % n) as i64,
    };
    ids.iter().map(row).collect()
}

/// The touched rows of each table. Changes `index` from rows of the table to rows of the leaf,
/// which has the touched rows only.
fn touched_rows(graph: &ExpertGraph, index: &mut [Vec<i64>]) -> Vec<Option<Vec<u32>>> {
    let mut rows: Vec<Option<Vec<u32>>> =
        graph.parameters.iter().map(|spec| spec.table.then(Vec::new)).collect();
    let table = |node: &Node| {
        let first = node.inputs.first().map(|input| &graph.nodes[*input].op);
        match (&node.op, first) {
            (Op::EmbeddingBag | Op::Gather, Some(Op::Parameter { parameter })) => Some(*parameter),
            _ => None,
        }
    };
    for (node, index) in graph.nodes.iter().zip(index.iter()) {
        if let Some(rows) = table(node).and_then(|parameter| rows[parameter].as_mut()) {
            rows.extend(index.iter().filter(|row| **row != NO_ROW).map(|row| *row as u32));
        }
    }
    for rows in rows.iter_mut().flatten() {
        rows.sort_unstable();
        rows.dedup();
    }
    for (node, index) in graph.nodes.iter().zip(index.iter_mut()) {
        if let Some(rows) = table(node).and_then(|parameter| rows[parameter].as_ref()) {
            for row in index.iter_mut().filter(|row| **row != NO_ROW) {
                *row = rows.binary_search(&(*row as u32)).expect("every touched row was gathered")
                    as i64;
            }
        }
    }
    rows
}

/// The values of a node of ids, row-major.
fn id_values(graph: &ExpertGraph, node: &Node, ids: &[Vec<u64>], batch: &ExpertBatch) -> Vec<u64> {
    let input = |at: usize| &ids[node.inputs[at]];
    let dims = |at: usize| &graph.nodes[node.inputs[at]].shape;
    match &node.op {
        Op::Input { column } => match &batch.columns[*column] {
            ColumnData::Ids(values) => values.clone(),
            ColumnData::Numbers(_) | ColumnData::Feature(_) => {
                unreachable!("a numeric column is no id node")
            }
        },
        Op::Reshape { .. } => input(0).clone(),
        Op::Concat { axis } => {
            let at = axis - dims(0).lead.iter().len();
            let parts: Vec<(&[u64], usize)> = (0..node.inputs.len())
                .map(|part| (input(part).as_slice(), dims(part).dims[at..].iter().product()))
                .collect();
            concat(&parts)
        }
        Op::Slice { axis, start, end } => {
            let at = axis - dims(0).lead.iter().len();
            let inner: usize = dims(0).dims[at + 1..].iter().product();
            let chunks = input(0).chunks_exact(dims(0).dims[at] * inner);
            chunks.flat_map(|chunk| &chunk[start * inner..end * inner]).copied().collect()
        }
        Op::Transpose { perm } => {
            transpose(input(0), &dims(0).dims, &perm[dims(0).lead.iter().len()..], dims(0).rank())
        }
        op => unreachable!("{op:?} gives no ids"),
    }
}

fn concat(parts: &[(&[u64], usize)]) -> Vec<u64> {
    let outer = parts[0].0.len() / parts[0].1;
    let row = |row: usize| {
        parts.iter().flat_map(move |(values, width)| &values[row * width..(row + 1) * width])
    };
    (0..outer).flat_map(row).copied().collect()
}

/// Permutes the fixed axes `dims` of each row. The axes in `perm` count all `rank` dimensions.
fn transpose(values: &[u64], dims: &[usize], perm: &[usize], rank: usize) -> Vec<u64> {
    let lead = rank - dims.len();
    let strides: Vec<usize> =
        (0..dims.len()).map(|axis| dims[axis + 1..].iter().product()).collect();
    let row: usize = dims.iter().product();
    let source = |mut position: usize| {
        let mut at = 0;
        for axis in perm.iter().rev().map(|axis| axis - lead) {
            at += position % dims[axis] * strides[axis];
            position /= dims[axis];
        }
        at
    };
    values
        .chunks_exact(row)
        .flat_map(|chunk| (0..row).map(|position| chunk[source(position)]))
        .collect()
}
