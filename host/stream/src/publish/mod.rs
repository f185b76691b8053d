//! Component-wise publishing: weights from a trainer to whoever serves them
//! (paper section 3.3.4), through a stream a version.
//!
//! A publication is a snapshot of all weights, or a delta of those that moved
//! most since they were last published. Deltas are chained to a snapshot; one that is
//! torn, damaged or of another chain is refused and changes nothing. What weights mean
//! is the models' business: here they are named tensors and rows by id.

mod follower;
mod mirror;
mod models;
mod publisher;
mod select;
mod wire;

pub use follower::{At, Follower, Refusals};
pub use models::{bootstrap, fm_update};
pub use publisher::{Facts, Published, Publisher};

use hypercast_expert::params::ParameterUpdate;
pub use hypercast_fm::update::TensorSlice;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A model's weights at one moment, as they serve: named dense tensors, and rows by id.
pub trait Weights {
    /// What goes with them, for [`Header::manifest`].
    fn manifest(&self) -> String;

    /// Every dense tensor, in an order that does not change.
    fn dense(&self) -> Vec<DenseTensor<'_>>;

    /// The rows, if the model has any.
    fn rows(&self) -> Option<&dyn Rows>;
}

/// A dense tensor.
#[derive(Debug, Clone, Copy)]
pub struct DenseTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its values, row-major.
    pub values: &'a [f32],
}

/// Rows by id, and what became of them.
pub trait Rows {
    /// Values a row.
    fn dim(&self) -> usize;

    /// How many there are.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A mark of this moment, for [`Rows::changed_since`].
    fn generation(&self) -> u64;

    /// Every id.
    fn ids(&self) -> Box<dyn Iterator<Item = u64> + '_>;

    /// Ids of the rows that changed or are new since a mark, maybe more.
    fn changed_since(&self, generation: u64) -> Vec<u64>;

    /// Ids that were removed since a mark; none where that is not known any more.
    fn removed_since(&self, generation: u64) -> Option<Vec<u64>>;

    /// Whether an id has a row.
    fn contains(&self, id: u64) -> bool;

    /// Copies rows to `out`, `[ids.len(), dim]`.
    fn gather(&self, ids: &[u64], out: &mut [f32]);
}

/// What a publication says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// Publications of the version so far, this one not counted.
    pub sequence: u64,
    /// All weights, or those that moved most.
    pub kind: PublicationKind,
    /// Of the publication before, which a delta goes on from; 0 for a snapshot.
    pub parent: u64,
    /// The stream's position up to which the trainer had learned: of `joined` for an FM, of the logs for an expert.
    pub trained_position: u64,
    /// Time of the newest request learned from, milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// When the newest event that was learned from was taken in, milliseconds since the epoch.
    pub ingested_ms: i64,
    /// When it was published, milliseconds since the epoch.
    pub published_ms: i64,
    /// What the model's crate needs besides the weights, as JSON: an FM's manifest, an expert's provenance.
    pub manifest: String,
}

/// All weights, or some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublicationKind {
    /// Everything: where whoever begins to follow begins.
    Snapshot,
    /// What moved most since it was last published.
    Delta,
}

impl Publication {
    /// The weights of an expert that this brings.
    pub fn parameter_update(&self) -> ParameterUpdate<'_> {
        ParameterUpdate {
            provenance: &self.header.manifest,
            pieces: &self.blocks,
            is_whole: self.header.kind == PublicationKind::Snapshot,
            rows: self.ids.len(),
        }
    }

    /// Takes over what a later delta brings, so that this is what a follower of both would have.
    ///
    /// # Errors
    /// A block of a tensor that is not here, or of another shape: the two are not of one model.
    pub fn absorb(&mut self, later: Publication) -> Result<()> {
        models::absorb(self, later)
    }
}

/// A whole publication, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// What it says of itself.
    pub header: Header,
    /// Dense weights.
    pub blocks: Vec<TensorSlice>,
    /// Ids of the rows.
    pub ids: Vec<u64>,
    /// `[ids.len(), dim]`.
    pub rows: Vec<f32>,
    /// Ids whose rows are gone.
    pub removed: Vec<u64>,
}

#[cfg(test)]
mod tests;
