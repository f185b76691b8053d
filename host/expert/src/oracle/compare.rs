//! Every way to run a graph against the evaluation in f64.

use std::sync::Arc;

use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::{Estimate, Evaluation};
use crate::Device;
use crate::batch::ExpertBatch;
use crate::graph::{ExpertGraph, Op};
use crate::network::network;
use crate::params::Parameters;
use crate::train::{Gradients, OutputGradients, compute};

/// A network, and one step of training of it.
pub struct Comparison<'a> {
    /// The network.
    pub graph: &'a Arc<ExpertGraph>,
    /// Its parameters.
    pub parameters: &'a Parameters,
    /// A batch with at least one row.
    pub batch: &'a ExpertBatch,
    /// Where the backward pass begins.
    pub loss: &'a OutputGradients,
    /// The seed of dropout.
    pub seed: u64,
}

/// How much of the results a bound says something about.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Compared {
    /// Values with a bound.
    pub known: usize,
    /// Values of which nothing is known in f32: too large, or divided by what may be 0.
    pub unknown: usize,
    /// The widest bound of a value, relative to the value where it is larger than 1.
    pub widest: f64,
}

impl Compared {
    fn values(&mut self, what: &str, found: &[f32], expected: &[Estimate]) -> Result<(), String> {
        if found.len() != expected.len() {
            return Err(format!("{what}: {} values, not {}", found.len(), expected.len()));
        }
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            let Estimate { value, error } = *expected;
            if !expected.allows(*found) {
                return Err(format!(
                    "{what}[{at}] is {found}, not {value} with an error of {error}"
                ));
            }
            match expected.is_known() {
                true => {
                    self.known += 1;
                    self.widest = self.widest.max(error / value.abs().max(1.0));
                }
                false => self.unknown += 1,
            }
        }
        Ok(())
    }
}

/// Compares the outputs of the program that serves, those of the executor, and the outputs and
/// gradients of a step of training, with dropout, with an evaluation in f64: on the CPU, and in a
/// build with wgpu on the device that this finds.
///
/// # Errors
/// The first value that is farther from the evaluation's than f32 explains; in a build with wgpu,
/// that this finds no device.
pub fn compare(case: &Comparison) -> Result<Compared, String> {
    let on_cpu = compare_on(Device::Cpu, case)?;
    if Device::Wgpu.is_in_build() {
        compare_on(Device::Wgpu, case).map_err(|error| format!("on wgpu, {error}"))?;
    }
    Ok(on_cpu)
}

fn compare_on(device: Device, case: &Comparison) -> Result<Compared, String> {
    let Comparison { graph, parameters, batch, loss, seed } = *case;
    let values: Vec<Vec<f64>> = (0..graph.parameters.len())
        .map(|index| parameters.values(index).iter().map(|value| f64::from(*value)).collect())
        .collect();
    let mut compared = Compared::default();
    let evaluation = Evaluation::new(graph, &values, batch, None);
    let outputs = evaluation.predicted();
    let fails = |error: crate::Error| error.to_string();
    let served = network(graph.clone(), parameters.clone(), device).map_err(fails)?;
    compared.values("the program's outputs", &served.outputs(batch), &outputs)?;
    let trained = compute(graph.clone(), device).map_err(fails)?;
    compared.values("the executor's outputs", &trained.forward(parameters, batch), &outputs)?;

    let random = || SmallRng::seed_from_u64(seed);
    let drops = graph.nodes.iter().any(|node| matches!(node.op, Op::Dropout { .. }));
    let evaluation = match drops {
        true => Evaluation::new(graph, &values, batch, Some(&mut random())),
        false => evaluation,
    };
    let mut outputs = Ok(());
    let gradients = trained.gradients(parameters, batch, &mut random(), &mut |tasks, losses| {
        outputs = compared
            .values("the step's outputs", tasks, &evaluation.outputs())
            .and_then(|()| compared.values("the step's losses", losses, &evaluation.losses()));
        loss.clone()
    });
    outputs?;
    let found = whole_gradients(graph, &gradients);
    for ((spec, found), expected) in
        graph.parameters.iter().zip(found).zip(evaluation.gradients(loss))
    {
        compared.values(&format!("the gradient of {}", spec.name), &found, &expected)?;
    }
    Ok(compared)
}

/// Gradients of whole parameters: 0 where none was computed.
pub fn whole_gradients(graph: &ExpertGraph, gradients: &Gradients) -> Vec<Vec<f32>> {
    let whole = |(index, spec): (usize, &crate::graph::ParameterSpec)| {
        let mut whole = vec![0.0; spec.len()];
        match (&gradients.values[index], &gradients.rows[index]) {
            (None, _) => {}
            (Some(values), None) => whole.copy_from_slice(values),
            (Some(values), Some(rows)) => {
                let width = spec.shape[1];
                for (row, values) in rows.iter().zip(values.chunks_exact(width)) {
                    whole[*row as usize * width..][..width].copy_from_slice(values);
                }
            }
        }
        whole
    };
    graph.parameters.iter().enumerate().map(whole).collect()
}
