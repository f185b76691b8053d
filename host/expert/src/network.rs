//! An expert's network as it serves, whatever the device: compiled on the CPU; on a GPU the
//! executor, with dense parameters on the device and embedding tables in host memory.

use std::sync::{Arc, Mutex};

use burn::tensor::ops::FloatTensor;
use hypercast_fm::device::{Cuda, Wgpu};
use hypercast_kernels::attention::HstuBackend;

use super::batch::ExpertBatch;
use super::compiled::Compiled;
use super::executor::{Executor, download};
use super::graph::ExpertGraph;
use super::params::Parameters;
use super::{Device, Error};

/// A graph with its trained parameters on some device.
pub trait ServingNetwork: Send + Sync {
    /// The outputs and ranking scores `[rows, graph.predicted()]` of a batch with at least one row.
    fn outputs(&self, batch: &ExpertBatch) -> Vec<f32>;
}

/// Puts `graph` and `parameters` on `device`.
pub fn network(
    graph: Arc<ExpertGraph>,
    parameters: Parameters,
    device: Device,
) -> Result<Box<dyn ServingNetwork>, Error> {
    device.check()?;
    Ok(match device {
        Device::Cpu => Box::new(Compiled::new(&graph, parameters)),
        Device::Cuda => Box::new(OnDevice::<Cuda>::new(graph, parameters, Default::default())),
        Device::Wgpu => Box::new(OnDevice::<Wgpu>::new(graph, parameters, Default::default())),
    })
}

/// The executor with its parameters.
pub(super) struct OnDevice<B: HstuBackend> {
    executor: Executor<B>,
    parameters: Parameters,
    /// Dense parameters on the device; `None` for tables.
    dense: Vec<Option<FloatTensor<B>>>,
}

impl<B: HstuBackend> OnDevice<B> {
    pub(super) fn new(graph: Arc<ExpertGraph>, parameters: Parameters, device: B::Device) -> Self {
        let executor = Executor::<B>::new(graph.clone(), device);
        let specs = graph.parameters.iter().enumerate();
        let dense = specs
            .map(|(index, spec)| (!spec.table).then(|| executor.dense_leaf(&parameters, index)))
            .collect();
        OnDevice { executor, parameters, dense }
    }
}

impl<B: HstuBackend> ServingNetwork for OnDevice<B> {
    fn outputs(&self, batch: &ExpertBatch) -> Vec<f32> {
        let lookups = self.executor.lookups(batch);
        let leaves = self.executor.leaves(&self.parameters, &lookups, &self.dense);
        download::<B>(self.executor.run(&leaves, &lookups, batch, None).tasks)
    }
}

/// Buffers that a [`BufferPool`] keeps: one for each concurrent request on most machines.
const MAX_POOLED: usize = 32;

/// Unused buffers that the next requests take, so that they need not allocate.
#[derive(Debug, Default)]
pub(super) struct BufferPool<T>(Mutex<Vec<T>>);

impl<T: Default> BufferPool<T> {
    /// Calls `work` with a buffer, which still has the content of its last use.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let pooled = || self.0.lock().expect("no holder panics");
        let mut buffer = pooled().pop().unwrap_or_default();
        let result = work(&mut buffer);
        let mut pooled = pooled();
        if pooled.len() < MAX_POOLED {
            pooled.push(buffer);
        }
        result
    }
}
