//! An expert's network as it is served, with the device erased: compiled on the
//! CPU; elsewhere the executor, with parameters moved to the device once, and tables in
//! host memory that are read by rows.

use std::sync::Arc;

use burn::tensor::ops::FloatTensor;
use hypercast_kernels::attention::HstuBackend;

use super::batch::ExpertBatch;
use super::compiled::Compiled;
use super::executor::{Executor, download};
use super::graph::Graph;
use super::params::Parameters;
use super::{Device, Error};

/// A graph with its trained parameters on some device.
pub trait Network: Send + Sync {
    /// The outputs `[rows, tasks]` of a batch with at least one row.
    fn outputs(&self, batch: &ExpertBatch) -> Vec<f32>;
}

/// Puts `graph` and `parameters` on `device`.
pub fn network(
    graph: Arc<Graph>,
    parameters: Parameters,
    device: Device,
) -> Result<Box<dyn Network>, Error> {
    match device {
        Device::Cpu => Ok(Box::new(Compiled::new(&graph, parameters))),
        #[cfg(feature = "cuda")]
        Device::Cuda => {
            Ok(Box::new(OnDevice::<burn_cuda::Cuda>::new(graph, parameters, Default::default())))
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda => Err(Error::without_cuda()),
    }
}

/// The executor with parameters on its device.
pub(super) struct OnDevice<B: HstuBackend> {
    executor: Executor<B>,
    parameters: Parameters,
    /// Dense parameters; `None` for tables.
    dense: Vec<Option<FloatTensor<B>>>,
}

impl<B: HstuBackend> OnDevice<B> {
    pub(super) fn new(graph: Arc<Graph>, parameters: Parameters, device: B::Device) -> Self {
        let executor = Executor::<B>::new(graph.clone(), device);
        let dense = |(index, spec): (usize, &super::graph::ParameterSpec)| {
            (!spec.table).then(|| executor.dense_leaf(&parameters, index))
        };
        let dense = graph.parameters.iter().enumerate().map(dense).collect();
        OnDevice { executor, parameters, dense }
    }
}

impl<B: HstuBackend> Network for OnDevice<B> {
    fn outputs(&self, batch: &ExpertBatch) -> Vec<f32> {
        let lookups = self.executor.lookups(batch);
        let leaf = |(index, dense): (usize, &Option<FloatTensor<B>>)| match (
            dense,
            &lookups.rows[index],
        ) {
            (Some(dense), _) => dense.clone(),
            (None, rows) => {
                let rows = rows.as_ref().expect("a table's touched rows are known");
                // A table that nothing here reads is a row to the device.
                let rows = if rows.is_empty() { &[0][..] } else { rows };
                self.executor.table_leaf(&self.parameters, index, rows)
            }
        };
        let leaves: Vec<FloatTensor<B>> = self.dense.iter().enumerate().map(leaf).collect();
        download::<B>(self.executor.run(&leaves, &lookups, batch, None).tasks)
    }
}
