//! One forward or backward pass on a device, behind an object-safe trait: the
//! backend is chosen at run time, the code is one.

use std::sync::Arc;

use burn::tensor::TensorMetadata;
use burn::tensor::backend::AutodiffBackend;
use burn::tensor::ops::FloatTensor;
use hypercast_kernels::attention::HstuBackend;
use rand::rngs::SmallRng;

use crate::batch::ExpertBatch;
use crate::executor::{Executor, Outputs, download};
use crate::graph::Graph;
use crate::params::Parameters;
use crate::{Device, Error};

/// What a loss asks of the backward pass: the gradient of each output.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Seed {
    /// `[rows, tasks]`.
    pub tasks: Vec<f32>,
    /// `[rows]`: the weight of each row's extra loss.
    pub extra_loss: Vec<f32>,
}

/// Gradients of a batch by parameter; `None` where the batch does not reach one.
#[derive(Debug, Clone, Default)]
pub struct Gradients {
    /// Dense parameters: of the whole; tables: of the touched rows.
    pub values: Vec<Option<Vec<f32>>>,
    /// The touched rows of tables.
    pub rows: Vec<Option<Vec<u32>>>,
}

impl Gradients {
    /// The norm over all gradients.
    pub fn norm(&self) -> f32 {
        let squares =
            |values: &Vec<f32>| values.iter().map(|g| f64::from(*g) * f64::from(*g)).sum::<f64>();
        self.values.iter().flatten().map(squares).sum::<f64>().sqrt() as f32
    }
}

/// The loss of a batch, given its outputs (`[rows, tasks]`) and each row's extra loss.
pub type LossFn<'a> = &'a mut dyn FnMut(&[f32], &[f32]) -> Seed;

/// Runs an expert's graph with the parameters of the moment.
pub trait Compute: Send + Sync {
    /// The outputs `[rows, tasks]`, without dropout.
    fn forward(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32>;

    /// Runs forward with dropout, asks `loss` for the gradient of the outputs,
    /// and runs backward.
    fn gradients(
        &self,
        parameters: &Parameters,
        batch: &ExpertBatch,
        rng: &mut SmallRng,
        loss: LossFn,
    ) -> Gradients;
}

/// The computation of `graph` on `device`.
pub fn compute(graph: Arc<Graph>, device: Device) -> Result<Box<dyn Compute>, Error> {
    match device {
        Device::Cpu => Ok(Box::new(OnBackend::<burn::backend::Autodiff<burn_flex::Flex>>::new(
            graph,
            Default::default(),
        ))),
        #[cfg(feature = "cuda")]
        Device::Cuda => Ok(Box::new(OnBackend::<burn::backend::Autodiff<burn_cuda::Cuda>>::new(
            graph,
            Default::default(),
        ))),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => Err(Error::without_cuda()),
    }
}

/// A training backend `A` and its inner one for inference.
pub(crate) struct OnBackend<A: AutodiffBackend + HstuBackend>
where
    A::InnerBackend: HstuBackend,
{
    training: Executor<A>,
    inference: Executor<A::InnerBackend>,
}

impl<A: AutodiffBackend + HstuBackend> OnBackend<A>
where
    A::InnerBackend: HstuBackend,
{
    pub(crate) fn new(graph: Arc<Graph>, device: A::Device) -> Self {
        OnBackend {
            training: Executor::new(graph.clone(), device.clone()),
            inference: Executor::new(graph, device),
        }
    }
}

impl<A: AutodiffBackend + HstuBackend> Compute for OnBackend<A>
where
    A::InnerBackend: HstuBackend,
{
    fn forward(&self, parameters: &Parameters, batch: &ExpertBatch) -> Vec<f32> {
        let lookups = self.inference.lookups(batch);
        let leaves = self.inference.leaves(parameters, &lookups);
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
        let leaves = self.training.leaves(parameters, &lookups);
        let leaves: Vec<FloatTensor<A>> =
            leaves.into_iter().map(|leaf| A::float_set_require_grad(leaf, true)).collect();
        let outputs = self.training.run(&leaves, &lookups, batch, Some(rng));
        let extra = outputs.extra_loss.clone().map(download::<A>).unwrap_or_default();
        let seed = loss(&download::<A>(outputs.tasks.clone()), &extra);
        let mut tape = A::backward(seeded::<A>(&self.training, outputs, seed));
        let gradient = |leaf| A::grad_remove(leaf, &mut tape).map(download::<A::InnerBackend>);
        Gradients { values: leaves.iter().map(gradient).collect(), rows: lookups.rows }
    }
}

/// The sum of outputs times their gradients: a scalar whose backward pass is
/// the loss's own.
fn seeded<A: AutodiffBackend + HstuBackend>(
    executor: &Executor<A>,
    outputs: Outputs<A>,
    seed: Seed,
) -> FloatTensor<A> {
    let dims = |tensor: &FloatTensor<A>| tensor.shape().as_slice().to_vec();
    let weighted = |tensor: FloatTensor<A>, weights: Vec<f32>| {
        let weights = executor.upload(weights, &dims(&tensor));
        A::float_sum(A::float_mul(tensor, weights))
    };
    let total = weighted(outputs.tasks, seed.tasks);
    match outputs.extra_loss {
        Some(extra) => A::float_add(total, weighted(extra, seed.extra_loss)),
        None => total,
    }
}
