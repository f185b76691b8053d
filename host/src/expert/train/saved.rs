//! A trainer's whole state, for a trainer that is stopped and goes on. Where it
//! is kept, and with which position in which stream, is the caller's business.

use serde::{Deserialize, Serialize};

use super::Optimizer;
use crate::expert::params::Provenance;

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
}
