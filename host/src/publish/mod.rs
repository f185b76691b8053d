//! Component-wise publishing: weights from a trainer to whoever serves them
//! (paper section 3.3.4), through a stream a version.
//!
//! A publication is a snapshot of all weights, or a delta of those that moved
//! most since they were last published. Deltas are chained to a snapshot; one that is
//! torn, damaged or of another chain is refused and changes nothing. What weights mean
//! is the models' business: here they are named tensors and rows by id.

use serde::{Deserialize, Serialize};

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

/// Some consecutive values of a named tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Block {
    /// The tensor.
    pub name: String,
    /// The shape of the whole tensor.
    pub shape: Vec<usize>,
    /// The first value's place in the row-major whole.
    pub start: usize,
    /// The values.
    pub values: Vec<f32>,
}

/// A whole publication, read and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Publication {
    /// What it says of itself.
    pub header: Header,
    /// Dense weights.
    pub blocks: Vec<Block>,
    /// Ids of the rows.
    pub ids: Vec<u64>,
    /// `[ids.len(), dim]`.
    pub rows: Vec<f32>,
    /// Ids whose rows are gone.
    pub removed: Vec<u64>,
}
