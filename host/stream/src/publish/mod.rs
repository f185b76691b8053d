//! Component-wise publishing: weights from a trainer to the processes that serve them (paper
//! section 3.3.4), through one stream for each version.
//!
//! A publication is a snapshot of all weights, or a delta of those that moved most since they were
//! last published. Deltas are chained to a snapshot. A publication that is incomplete, damaged or
//! of another chain is refused and changes nothing. This module knows weights as named tensors and
//! rows by id; what they mean is up to the models.
//!
//! What is sent is taken from the weights at one moment and sent by another thread, so that a
//! publication does not stop learning ([`BackgroundPublisher`]).

mod background;
mod codec;
mod follower;
mod models;
mod published_state;
mod publisher;
mod select;

pub use background::{BackgroundPublisher, SentPublication};
pub use follower::{PublicationFollower, Refusals};
pub use models::{bootstrap, fm_update};
pub use publisher::{PreparedPublication, PublicationStats, Publisher, TrainingPosition};

use hypercast_expert::params::ParameterUpdate;
pub use hypercast_fm::update::TensorSlice;
use hypercast_store::Store;
use serde::{Deserialize, Serialize};

/// A model's weights at one moment: named dense tensors and rows by id.
pub trait WeightSource {
    /// The metadata for [`PublicationHeader::manifest`].
    fn manifest(&self) -> String;

    /// All dense tensors, always in the same order.
    fn dense(&self) -> Vec<DenseTensor<'_>>;

    /// The rows, if the model has any, with nothing uncommitted.
    fn rows(&self) -> Option<&Store>;
}

/// A dense tensor of the weights, by name.
#[derive(Debug, Clone, Copy)]
pub struct DenseTensor<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [usize],
    /// Its values, row-major.
    pub values: &'a [f32],
}

/// The header of a publication.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PublicationHeader {
    /// The publication's number within its version, from 0.
    pub sequence: u64,
    /// Whether it has all weights.
    pub kind: PublicationKind,
    /// The number of the publication that a delta continues; 0 for a snapshot.
    pub parent: u64,
    /// The stream position up to which the model was trained: of `joined` for an FM, of the logs
    /// for an expert.
    pub trained_position: u64,
    /// The time of the newest request in training, milliseconds since the epoch.
    pub trained_until_ms: i64,
    /// When the newest event in training was received, milliseconds since the epoch.
    pub ingested_ms: i64,
    /// When it was published, milliseconds since the epoch.
    pub published_ms: i64,
    /// Metadata for the model's crate as JSON: an FM's manifest, or an expert's provenance.
    pub manifest: String,
}

/// Whether a publication has all weights or some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PublicationKind {
    /// All weights; a new follower begins here.
    Snapshot,
    /// The weights that moved most since they were last published.
    Delta,
}

impl Publication {
    /// The update of an expert's parameters.
    pub fn parameter_update(&self) -> ParameterUpdate<'_> {
        ParameterUpdate {
            provenance: &self.header.manifest,
            pieces: &self.blocks,
            is_whole: self.header.kind == PublicationKind::Snapshot,
            rows: self.ids.len(),
        }
    }
}

/// A complete publication that passed all checks.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// The header.
    pub header: PublicationHeader,
    /// Dense weights.
    pub blocks: Vec<TensorSlice>,
    /// The ids of the rows.
    pub ids: Vec<u64>,
    /// The rows, of shape `[ids.len(), dim]`.
    pub rows: Vec<f32>,
    /// The ids of removed rows.
    pub removed: Vec<u64>,
}

#[cfg(test)]
mod tests;
