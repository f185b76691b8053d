//! Recorded requests: a sampled share of what was answered, with all that it takes to answer it again: the whole
//! example, what the FM said of it, and the answer.
//!
//! [`writer`] puts them into a ring of files beside the requests, [`reader`] reads them, and [`replay`] runs a component
//! over them, beside another one or what was answered. Nothing here is on the path of a request but an offer to a queue.

pub mod reader;
pub mod replay;
pub mod report;
pub mod writer;

use hypercast_fm::example::Example;
use serde::{Deserialize, Serialize};

pub use crate::request_log::{
    reader::newest,
    replay::{ReplayExpert, ReplaySettings, replay},
    report::ReplayReport,
    writer::{RequestLog, RequestToLog},
};

/// The first bytes of a file; the number is the layout's.
const MAGIC: &[u8; 8] = b"hcreqs01";

/// What a file's name ends with.
const EXTENSION: &str = "requests";

/// The largest record that is read, in bytes once unpacked: what a damaged length may cost.
const MAX_RECORD: usize = 64 << 20;

/// A request that was answered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordedRequest {
    /// [`hypercast_stream::versions::schema_hash`] of the schema that its columns are of.
    pub schema: String,
    /// When it was answered, milliseconds since the epoch.
    pub at_ms: i64,
    /// The request with its features.
    pub example: Example,
    /// The FM version that was asked.
    pub fm: String,
    /// Values of its TAE.
    pub tae_dim: usize,
    /// `[candidates, tae_dim]`; empty where the FM did not answer.
    pub tae: Vec<f32>,
    /// Who answered, as `NAME@VERSION`; empty where no expert did.
    pub arm: String,
    /// Whether the FM's ranking stood in.
    pub degraded: bool,
    /// The items in the order of the answer, with their scores.
    pub ranking: Vec<(u64, f32)>,
}
