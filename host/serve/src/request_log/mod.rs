//! The request log: a sample of answered requests, each with everything that is needed to answer it
//! again: the example, the FM's output, and the answer.
//!
//! [`writer`] writes them to a ring of files, [`reader`] reads them, and [`replay`] runs a
//! component on them and compares its rankings with another component's or with the recorded
//! answers. A request only pays for an offer to a queue.

pub mod reader;
pub mod replay;
pub mod report;
pub mod writer;

use hypercast_data::schema::{ColumnUpgrade, Schema};
use hypercast_fm::example::Example;
use hypercast_stream::registry::{earlier_schema_hashes, schema_hash};
use serde::{Deserialize, Serialize};

pub use crate::request_log::{
    reader::newest,
    replay::{ReplayExpert, ReplaySettings, replay},
    report::ReplayReport,
    writer::RequestLog,
};

/// The first bytes of a file, with the version of the layout.
const MAGIC: &[u8; 8] = b"hcreqs01";

/// Extension of the files.
const EXTENSION: &str = "requests";

/// Limit of an unpacked record in bytes, in case a length is damaged.
const MAX_RECORD: usize = 64 << 20;

/// An answered request, as it is stored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RecordedRequest {
    /// [`hypercast_stream::registry::schema_hash`] of the schema of its columns.
    pub schema: String,
    /// When it was answered, milliseconds since the epoch.
    pub at_ms: i64,
    /// The request with its features.
    pub example: Example,
    /// The FM version that was asked.
    pub fm: String,
    /// Width of its TAE.
    pub tae_dim: usize,
    /// `[candidates, tae_dim]`; empty where the FM did not answer.
    pub tae: Vec<f32>,
    /// The expert version that answered, as `NAME@VERSION`; empty if none did.
    pub arm: String,
    /// Whether the answer was degraded.
    pub degraded: bool,
    /// Items with their scores, in the order of the answer.
    pub ranking: Vec<(u64, f32)>,
    /// For each place of the ranking, the probability that the expert gave for it, if it explores.
    /// It stands behind the record, where earlier versions have nothing; theirs are read as empty.
    #[serde(skip)]
    pub propensities: Vec<Option<f32>>,
    /// `[candidates, main tasks]`: the FM's own predictions. They stand behind the propensities,
    /// and are empty where the FM did not answer or an earlier version recorded the request.
    #[serde(skip)]
    pub predictions: Vec<f32>,
}

/// The schema under which requests are replayed. Those that were recorded before it grew are
/// brought to its layout.
pub struct ReplaySchema {
    /// Of all layouts that it has had.
    hashes: Vec<String>,
    upgrade: ColumnUpgrade,
    main_tasks: usize,
}

impl ReplaySchema {
    /// Of a data set.
    pub fn new(schema: &Schema) -> ReplaySchema {
        let hashes = std::iter::once(schema_hash(schema)).chain(earlier_schema_hashes(schema));
        let main_tasks = schema.main_tasks().count();
        ReplaySchema { hashes: hashes.collect(), upgrade: ColumnUpgrade::new(schema), main_tasks }
    }

    /// Whether a request was recorded under it.
    pub fn has(&self, request: &RecordedRequest) -> bool {
        self.hashes.contains(&request.schema)
    }

    /// Brings a request that it has to the present layout.
    pub fn upgraded(&self, mut request: RecordedRequest) -> RecordedRequest {
        self.upgrade.example(&mut request.example);
        // Tasks that were added since come last, and nothing is known of them.
        let rows = request.example.targets.len().max(1);
        let before = request.predictions.len() / rows;
        if 0 < before && before < self.main_tasks {
            let added = vec![f32::NAN; self.main_tasks - before];
            let all = request.predictions.chunks_exact(before);
            request.predictions = all.flat_map(|row| [row, &added].concat()).collect();
        } else if request.predictions.len() != rows * self.main_tasks {
            request.predictions.clear();
        }
        request
    }
}
