//! Training jobs: the FM over the stream, TAEs into logs, experts from logs.
//!
//! Each job reads its own input and nothing of the others' state: the FM reads
//! the data set, an expert the logs. What a step computes is the model crates'.

mod checkpoint_embedder;
mod chunk_rows;
mod content_reader;
mod early_stop;
pub mod error;
mod eval_window;
pub mod expert;
pub mod fm;
pub mod follow_expert;
pub mod follow_fm;
mod holds;
pub mod job_metrics;
mod joined_reader;
pub mod logging;
pub mod materialise;
mod progress_log;
pub mod report;
mod run_state;
pub mod stream;

pub use early_stop::PassScores;
pub use error::{Error, Result};
pub use holds::{HeldPublications, HeldVersion};

use std::sync::Arc;

use hypercast_config::Config;
use hypercast_data::dataset::Dataset;
use hypercast_stream::streams::StreamEngine;

/// What a service that follows a stream works with.
#[derive(Clone)]
pub struct ServiceContext<'a> {
    /// The data set, for its schema and content vectors.
    pub dataset: &'a Dataset,
    /// The whole configuration: jobs use most of its tables.
    pub config: &'a Config,
    /// The streams.
    pub engine: Arc<dyn StreamEngine>,
}
