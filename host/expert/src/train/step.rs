//! Forward and backward passes on a device, behind an object-safe trait, so that the device is
//! chosen at run time.

use std::sync::Arc;

use burn::backend::Autodiff;
use burn::tensor::TensorMetadata;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::FloatTensor;
use hypercast_fm::device::{Cpu, Cuda, Wgpu};
use hypercast_kernels::attention::HstuBackend;
use rand::rngs::SmallRng;

use crate::batch::ExpertBatch;
use crate::executor::{Executor, GraphOutputs, download};
use crate::graph::ExpertGraph;
use crate::params::Parameters;
use crate::plan::has_gradient;
use crate::{Device, Error};

/// The loss's gradient by each output, where the backward pass starts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OutputGradients {
    /// `[rows, tasks]`, by each task's output.
    pub tasks: Vec<f32>,
    /// `[rows, losses]`, the weight of each row's losses, as [`ExpertGraph::loss_nodes`] has them.
    pub losses: Vec<f32>,
}

/// The gradients of a batch by parameter; `None` if it is frozen, or no output depends on it.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// Of a whole dense parameter, or of a table's touched rows.
    pub values: Vec<Option<Vec<f32>>>,
    /// The touched rows of each table.
    pub rows: Vec<Option<Vec<u32>>>,
}

impl Gradients {
    /// The Euclidean norm over all gradients.
    pub fn norm(&self) -> f32 {
        let squares =
            |values: &Vec<f32>| values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        self.values.iter().flatten().map(squares).sum::<f64>().sqrt() as f32
    }
}

/// A loss: from a batch's outputs (`[rows, tasks]`) and each row's losses (`[rows, losses]`) to
/// their gradients.
pub type LossFn<'a> = &'a mut dyn FnMut(&[f32], &[f32]) -> OutputGradients;

/// Runs an expert's graph with parameters that change.
pub trait Compute: Send + Sync {
    /// The outputs and ranking scores `[rows, graph.predicted()]`, without dropout.
    fn forward(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32>;

    /// Runs forward with dropout, calls `loss` for the gradients of the outputs, and runs backward.
    fn gradients(
        &self,
        parameters: &Parameters,
        batch: &ExpertBatch,
        rng: &mut SmallRng,
        loss: LossFn,
    ) -> Gradients;
}

/// The computation of `graph` on `device`.
pub fn compute(graph: Arc<ExpertGraph>, device: Device) -> Result<Box<dyn Compute>, Error> {
    device.check()?;
    Ok(match device {
        Device::Cpu => Box::new(OnBackend::<Autodiff<Cpu>>::new(graph, Default::default())),
        Device::Cuda => Box::new(OnBackend::<Autodiff<Cuda>>::new(graph, Default::default())),
        Device::Wgpu => Box::new(OnBackend::<Autodiff<Wgpu>>::new(graph, Default::default())),
    })
}

/// A training backend `A`, and its inner backend for forward passes.
pub(crate) struct OnBackend<A: AutodiffBackend<InnerBackend: HstuBackend> + HstuBackend> {
    training: Executor<A>,
    inference: Executor<A::InnerBackend>,
    /// Whether each parameter learns; none does where no gradient comes to an output or a loss.
    learns: Vec<bool>,
}

impl<A: AutodiffBackend<InnerBackend: HstuBackend> + HstuBackend> OnBackend<A> {
    pub(crate) fn new(graph: Arc<ExpertGraph>, device: A::Device) -> Self {
        let has_gradient = has_gradient(&graph);
        let any = graph.ends().iter().any(|end| has_gradient[*end]);
        OnBackend {
            learns: graph.parameters.iter().map(|own| any && own.learns()).collect(),
            training: Executor::learning(graph.clone(), device.clone()),
            inference: Executor::new(graph, device),
        }
    }
}

impl<A: AutodiffBackend<InnerBackend: HstuBackend> + HstuBackend> Compute for OnBackend<A> {
    fn forward(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32> {
        let lookups = self.inference.lookups(batch);
        let leaves = self.inference.leaves(parameters, &lookups, &[]);
        download::<A::InnerBackend>(self.inference.run(&leaves, &lookups, batch, None).tasks)
    }

    fn gradients(
        &self,
        parameters: &Parameters,
        batch: &ExpertBatch,
        rng: &mut SmallRng,
        loss: LossFn,
    ) -> Gradients {
        let lookups = self.training.lookups(batch);
        let leaves = self.training.leaves(parameters, &lookups, &[]).into_iter();
        let leaf = |(leaf, learns): (_, &bool)| A::float_set_require_grad(leaf, *learns);
        let leaves: Vec<FloatTensor<A>> = leaves.zip(&self.learns).map(leaf).collect();
        let outputs = self.training.run(&leaves, &lookups, batch, Some(rng));
        let losses = outputs.losses.clone().map(download::<A>).unwrap_or_default();
        let seed = loss(&download::<A>(outputs.tasks.clone()), &losses);
        if !self.learns.contains(&true) {
            return Gradients { values: vec![None; leaves.len()], rows: lookups.rows };
        }
        let mut tape = A::backward(weighted_sum::<A>(&self.training, outputs, seed));
        let gradient = |leaf| A::grad_remove(leaf, &mut tape).map(download::<A::InnerBackend>);
        Gradients { values: leaves.iter().map(gradient).collect(), rows: lookups.rows }
    }
}

/// The sum of outputs times their gradients: its backward pass equals that of the loss.
fn weighted_sum<A: AutodiffBackend + HstuBackend>(
    executor: &Executor<A>,
    outputs: GraphOutputs<A>,
    seed: OutputGradients,
) -> FloatTensor<A> {
    let weighted = |tensor: FloatTensor<A>, weights: Vec<f32>| {
        let weights = executor.upload(weights, tensor.shape().as_slice());
        A::float_sum(A::float_mul(tensor, weights))
    };
    let total = weighted(outputs.tasks, seed.tasks);
    match outputs.losses {
        Some(losses) => A::float_add(total, weighted(losses, seed.losses)),
        None => total,
    }
}
