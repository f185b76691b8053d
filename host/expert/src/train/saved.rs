//! A trainer's whole state, for a trainer that is stopped and goes on. Where it
//! is kept, and with which position in which stream, is the caller's business.

use serde::{Deserialize, Serialize};

use super::Optimizer;
use crate::graph::Graph;
use crate::params::{Parameters, Provenance, hash_text};

/// What [`super::ExpertTrainer::resume`] goes on from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedTrainer {
    /// Parameters as they learn, in the graph's order.
    pub(super) values: Vec<Vec<f32>>,
    /// What they belong to.
    pub(super) provenance: Provenance,
    /// The averaged parameters and the steps that they followed.
    pub(super) average: Option<(Vec<Vec<f32>>, u64)>,
    pub(super) optimizer: Optimizer,
    /// Chunks learned from.
    pub(super) chunks: u64,
}

impl SavedTrainer {
    /// What the parameters belong to.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Whether parameters, average and optimiser are those of `other`, whatever is drawn next.
    pub fn learned_like(&self, other: &SavedTrainer) -> bool {
        *self == SavedTrainer { chunks: self.chunks, ..other.clone() }
    }

    /// The parameters that predicted then: the averaged ones, if there were any.
    ///
    /// # Errors
    /// What does not fit `graph`, in words.
    pub fn predicting(&self, graph: &Graph) -> Result<Parameters, &'static str> {
        let values = self.average.as_ref().map_or(&self.values, |(values, _)| values);
        self.parameters(graph, values)
    }

    /// The parameters that learned.
    pub(super) fn learning(&self, graph: &Graph) -> Result<Parameters, &'static str> {
        self.parameters(graph, &self.values)
    }

    /// The averaged parameters, and the steps that they followed.
    pub(super) fn averaged(
        &self,
        graph: &Graph,
    ) -> Result<Option<(Parameters, u64)>, &'static str> {
        let averaged = self.average.as_ref();
        averaged.map(|(values, steps)| Ok((self.parameters(graph, values)?, *steps))).transpose()
    }

    fn parameters(&self, graph: &Graph, values: &[Vec<f32>]) -> Result<Parameters, &'static str> {
        if self.provenance.graph != hash_text(graph) {
            return Err("another network");
        }
        Parameters::with_values(graph, values.to_vec(), self.provenance.clone())
            .filter(|_| self.optimizer.fits(graph))
            .ok_or("parameters of other shapes")
    }
}
