//! Feature logs: served requests with their columns, outcomes and materialised target-aware
//! embeddings (paper section 3.2), in Parquet with zstd.
//!
//! Experts train on these alone, without the FM. `writer` appends, `reader` reads logs of the past,
//! and `follower` reads them while another process writes.
//!
//! A log directory contains `log-manifest.json`, `schema.toml` and pairs of tables that are joined
//! by `request`: `requests-NNNN.parquet` and `examples-NNNN.parquet`. A file contains the
//! embeddings of one or several FM versions, one column each (`tae:VERSION`), and their
//! predictions, one column for each main task (`prediction:VERSION:TASK`). Its metadata names the
//! versions.

mod file;
mod follower;
mod layout;
mod reader;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_core::disk;
use hypercast_fm::example::{Event, Example};
use serde::{Deserialize, Serialize};

pub use follower::{LogFollower, LogPosition};
pub use reader::{LogIter, LogReader};
pub use writer::{LogOptions, LogRow, LogWriter, LoggedPlace, TaeStorage};

use self::file::{examples_path, file_numbers, requests_path};
use crate::error::{CommonErrors as _, Error, Result};
use crate::ranked_place::RankedPlace;
use crate::schema::Schema;

/// One logged request.
///
/// When it is read back, its history's events have ids and categorical features, but no dense
/// features, content vectors or values, because logs do not contain these.
#[derive(Debug, Clone)]
pub struct LoggedRequest {
    /// The request, with its history cut to the last events of its own surface.
    pub example: Example,
    /// The targets' embeddings of the FM version for which the log was opened, row-major
    /// `[targets, tae_dim]`.
    pub tae: Vec<f32>,
    /// That version's own predictions of its main tasks, which are the schema's in their order,
    /// row-major `[targets, main tasks]`: probabilities, or values in the unit of the label. NaN
    /// where the log has none, as logs of earlier releases.
    pub predictions: Vec<f32>,
    /// Where each target was ranked before it was shown, if that is known.
    pub ranked: Vec<Option<RankedPlace>>,
    /// Whether these are outcomes that became known after the request was logged. Only what changed
    /// is known of the targets.
    pub correction: bool,
    /// The time when the newest of its events was received, in milliseconds since the epoch; 0 if
    /// unknown.
    pub ingested_ms: i64,
}

/// An FM version whose embeddings a file contains.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogVersion {
    /// The FM's version.
    pub version: String,
    /// The length of an embedding.
    pub tae_dim: usize,
}

impl LogVersion {
    /// A version with embeddings of `tae_dim` values.
    pub fn new(version: impl Into<String>, tae_dim: usize) -> LogVersion {
        LogVersion { version: version.into(), tae_dim }
    }
}

/// Properties of all files of a log directory: `log-manifest.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogManifest {
    /// The version of the layout.
    pub format: u32,
    /// The most events in a request's history.
    pub history_len: usize,
}

/// The layout that this version writes and reads.
const FORMAT: u32 = 2;

impl LogManifest {
    fn load(dir: &Path) -> Result<LogManifest> {
        let path = dir.join("log-manifest.json");
        let text = disk::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |error: serde_json::Error| Error::data(&path, error.to_string());
        let value: serde_json::Value = serde_json::from_str(&text).map_err(wrong)?;
        let format = value.get("format").and_then(serde_json::Value::as_u64);
        if let Some(other) = format.filter(|&format| format != u64::from(FORMAT)) {
            let reason = format!(
                "log format {other}; this version reads format {FORMAT}. Remove the folder and \
                 write the logs again (`hypercast train fm` or `hypercast materialise`)"
            );
            return Err(Error::data(&path, reason));
        }
        serde_json::from_value(value).map_err(wrong)
    }
}

/// The schema that a log directory is written in; whoever writes there replaces it once it has
/// taken a growth over.
pub fn schema_path(dir: &Path) -> PathBuf {
    dir.join("schema.toml")
}

/// The manifest and the schema of a log directory.
fn load_header(dir: &Path) -> Result<(LogManifest, Arc<Schema>)> {
    if !disk::is_file(&dir.join("log-manifest.json")) {
        let reason = "no feature logs here: `log-manifest.json` is missing; `hypercast materialise` \
                      writes it";
        return Err(Error::data(dir, reason));
    }
    Ok((LogManifest::load(dir)?, Arc::new(Schema::load(&schema_path(dir))?)))
}

/// The last `len` events on one surface, which are the history that an expert sees.
pub fn short_history(history: &[Event], surface: u16, len: usize) -> Vec<Event> {
    let on_surface = history.iter().rev().filter(|event| event.surface == surface);
    let mut events: Vec<Event> = on_surface.take(len).cloned().collect();
    events.reverse();
    events
}

/// Cuts a log directory to its first `files` files. A resumed run writes the others again.
///
/// # Errors
/// One of the first `files` is missing, or the file system fails.
pub fn truncate(dir: &Path, files: u32) -> Result<()> {
    let found = if disk::is_dir(dir) { file_numbers(dir)? } else { Vec::new() };
    if let Some(missing) = (0..files).find(|number| !found.contains(number)) {
        return Err(Error::data(
            requests_path(dir, missing),
            "it is missing, so the run cannot be resumed; train without --resume",
        ));
    }
    for number in found.into_iter().filter(|&number| number >= files) {
        for path in [requests_path(dir, number), examples_path(dir, number)] {
            disk::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
