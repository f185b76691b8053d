//! A network compiled for serving on the CPU, once a version, as `plan` says: one program with its
//! weights laid out, and an executor for the other nodes, which runs first. Training does not use
//! this module.

use std::sync::Arc;

use burn_flex::Flex;
use hypercast_core::hash::mix64;
use hypercast_kernels::cpu::Isa;
use hypercast_kernels::cpu::program::{NO_ROW, Program, ProgramFeed};

use super::batch::{ABSENT, ColumnData, ExpertBatch, or_zero};
use super::graph::{ExpertGraph, Node};
use super::network::{BufferPool, OnDevice, ServingNetwork};
use super::params::Parameters;
use super::plan::{Lookup, NetworkPlan, reach};

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

impl Compiled {
    /// Compiles a graph with its trained parameters.
    pub fn new(graph: &ExpertGraph, parameters: Parameters) -> Self {
        let NetworkPlan { program, columns, lookups, rest } = NetworkPlan::new(graph);
        let program = program.with(&parameters);
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
        let row = |id: u64| match self.hashed {
            true if id == ABSENT => NO_ROW,
            true => (mix64(id) % self.entries) as u32,
            false => (or_zero(id) % self.entries) as u32,
        };
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
    let (scores, losses) = (Vec::new(), Vec::new());
    ExpertGraph { nodes, outputs, scores, losses, extra_loss: None, ..graph.clone() }
}
