//! Random networks, run in every way there is and compared with an evaluation in f64: the program
//! that serves, the executor, and a step of training with its gradients.
//!
//! The oracle states the bound of each value, because f32 does not have the same digits everywhere:
//! where a network divides by what cancels, nothing can be asked of it.

use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use hypercast_expert::batch::{ColumnData, ExpertBatch};
use hypercast_expert::graph::GraphLimits;
use hypercast_expert::oracle::{Comparison, compare};
use hypercast_expert::train::OutputGradients;

use crate::graph::{self, GrownNetwork};
use crate::world;

/// Small, because the oracle keeps every product.
fn limits() -> GraphLimits {
    GraphLimits {
        nodes: 64,
        parameters: 1 << 12,
        dimension: 1 << 7,
        row_elements: 1 << 8,
        flops_per_candidate: 1 << 14,
        ..GraphLimits::default()
    }
}

/// Grows a network, and compares its results for a batch.
pub fn run(u: &mut Unstructured) -> Result<()> {
    let description = graph::description(u.int_in_range(0..=9)?);
    let net = GrownNetwork::of(u, &description, limits())?;
    let sizes = graph::sizes(u)?;
    let graph = Arc::new(net.finish(u.ratio(1, 4)?));
    let [first, second] = [u.arbitrary::<u8>()?, u.arbitrary::<u8>()?].map(u64::from);
    let mut batch = graph::batch(&description, sizes, first);
    scale(&mut batch, *u.choose(&[1.0, 1e-3, 20.0])?);
    let slope = *u.choose(&[1.0, 1e-3, 1e3])?;
    let slopes = |seed, count| -> Vec<f32> {
        world::noise(seed, count).into_iter().map(|value| value * slope).collect()
    };
    let losses = batch.rows * graph.loss_nodes().len();
    let loss = OutputGradients {
        tasks: slopes(second, batch.rows * description.tasks.len()),
        losses: slopes(second + 1, losses),
    };
    let compared = compare(&Comparison {
        graph: &graph,
        parameters: &graph::parameters(&graph, second),
        batch: &batch,
        loss: &loss,
        seed: first,
    });
    if let Err(error) = compared {
        panic!("{error}: {graph:#?}");
    }
    Ok(())
}

fn scale(batch: &mut ExpertBatch, by: f32) {
    let scale = |values: &mut Vec<f32>| values.iter_mut().for_each(|value| *value *= by);
    scale(&mut batch.features);
    for column in &mut batch.columns {
        if let ColumnData::Numbers(values) = column {
            scale(values);
        }
    }
}
