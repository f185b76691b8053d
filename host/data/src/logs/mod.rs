//! Logs: what is written while the system runs.
//!
//! `writer` and `reader` are the feature logs: served requests with their columns, outcomes
//! and materialised target-aware embeddings (paper section 3.2), in Parquet +
//! zstd. An expert is trained on these alone, without the FM; `follower` reads them
//! while another process writes them.
//!
//! A log directory holds `log-manifest.json`, `schema.toml` and pairs of tables
//! joined by `request`: `requests-NNNN.parquet` and `examples-NNNN.parquet`. A file holds the
//! embeddings of one or several FM versions, a column each (`tae:VERSION`), and says which in its metadata.

mod corrections;
mod follower;
mod layout;
mod pair;
mod reader;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use hypercast_fm::example::{Event, Example};
use serde::{Deserialize, Serialize};

pub use follower::{LogFollower, LogPosition};
pub use reader::{LogIter, LogReader};
pub use writer::{LogOptions, LogRow, LogWriter, TaeStorage};

use crate::error::{CommonErrors as _, Error, Result};

/// One logged request.
///
/// Read back, its history's events carry ids and categorical features but no
/// dense ones and no values: the logs do not hold them.
#[derive(Debug, Clone)]
pub struct Logged {
    /// The request, its history cut to the short one of its own surface.
    pub example: Example,
    /// The targets' embeddings of the FM version that the log was opened for, row-major `[targets, tae_dim]`.
    pub tae: Vec<f32>,
    /// Whether these are outcomes that came after their request was logged: only what changed is known of the targets.
    pub correction: bool,
    /// When the newest of its events was taken in, milliseconds since the epoch; 0 where that is not known.
    pub ingested_ms: i64,
}

/// An FM version whose embeddings a file holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogVersion {
    /// The version.
    pub version: String,
    /// Length of its embedding.
    pub tae_dim: usize,
}

impl LogVersion {
    /// A version whose embeddings have `tae_dim` values.
    pub fn new(version: impl Into<String>, tae_dim: usize) -> LogVersion {
        LogVersion { version: version.into(), tae_dim }
    }
}

/// What a file says of itself, under the key `hypercast` of its metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileNote {
    /// The FM versions, in the order of their columns.
    versions: Vec<LogVersion>,
    /// The position in the stream `joined` after the last request; none where the logs are not of a stream.
    position: Option<u64>,
    /// Corrections among the requests.
    corrections: usize,
}

/// The metadata key of [`FileNote`].
const NOTE: &str = "hypercast";

/// What holds for all files of a log directory: `log-manifest.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogManifest {
    /// Version of this layout.
    pub format: u32,
    /// Events of short history at most.
    pub history_len: usize,
}

/// The layout that this version writes and reads.
const FORMAT: u32 = 2;

/// The last `len` events on one surface: what an expert sees of the history.
pub fn short_history(history: &[Event], surface: u16, len: usize) -> Vec<Event> {
    let on_surface = history.iter().rev().filter(|event| event.surface == surface);
    let mut events: Vec<Event> = on_surface.take(len).cloned().collect();
    events.reverse();
    events
}

impl LogManifest {
    fn load(dir: &Path) -> Result<LogManifest> {
        let path = dir.join("log-manifest.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let wrong = |error: serde_json::Error| Error::data(&path, error.to_string());
        let value: serde_json::Value = serde_json::from_str(&text).map_err(wrong)?;
        let format = value.get("format").and_then(serde_json::Value::as_u64);
        if let Some(other) = format.filter(|&format| format != u64::from(FORMAT)) {
            return Err(Error::data(
                &path,
                format!(
                    "log format {other}; this version reads format {FORMAT}: remove the folder and write the logs again (`hypercast train fm` or `hypercast materialise`)"
                ),
            ));
        }
        serde_json::from_value(value).map_err(wrong)
    }
}

fn requests_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("requests-{number:04}.parquet"))
}

fn examples_path(dir: &Path, number: u32) -> PathBuf {
    dir.join(format!("examples-{number:04}.parquet"))
}

/// The numbers of the complete pairs, ascending. A pair is complete once its requests have their name.
fn numbers(dir: &Path) -> Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let name = entry.map_err(Error::io(dir))?.file_name();
        let name = name.to_string_lossy();
        let number = name.strip_prefix("requests-").and_then(|name| name.strip_suffix(".parquet"));
        numbers.extend(number.and_then(|number| number.parse::<u32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Takes a log directory back to its first `files` files: what a run wrote after it was saved is
/// written again when it is resumed.
///
/// # Errors
/// One of the first `files` that is missing, or what the file system says.
pub fn truncate(dir: &Path, files: u32) -> Result<()> {
    let found = match dir.is_dir() {
        true => numbers(dir)?,
        false => Vec::new(),
    };
    if let Some(missing) = (0..files).find(|number| !found.contains(number)) {
        return Err(Error::data(
            requests_path(dir, missing),
            "it is missing, so the run cannot be resumed; train without --resume",
        ));
    }
    for number in found.into_iter().filter(|&number| number >= files) {
        for path in [requests_path(dir, number), examples_path(dir, number)] {
            fs::remove_file(&path).map_err(Error::io(&path))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
