//! Training jobs: the FM over the stream, TAEs into logs, experts from logs.
//!
//! Each job reads its own input and nothing of the others' state: the FM reads
//! the data set, an expert the logs. What a step computes is the model crates'.

pub mod error;
pub mod expert;
pub mod fm;
pub mod follow_expert;
pub mod follow_fm;
mod joined;
pub mod logging;
pub mod materialise;
mod measured;
pub mod report;
mod saved;
pub mod stream;
pub mod telemetry;
mod tell;

pub use error::{Error, Result};
