//! Logs: what is written while the system runs.
//!
//! `writer` and `reader` are the feature logs: served requests with their columns, outcomes
//! and materialised target-aware embeddings (paper section 3.2), in Parquet +
//! zstd. An expert is trained on these alone, without the FM.
//!
//! A log directory holds `log-manifest.json`, `schema.toml` and pairs of tables
//! joined by `request`: `requests-NNNN.parquet` and `examples-NNNN.parquet`.

mod layout;
mod reader;
mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use hypercast_fm::example::{Event, Example};
use serde::{Deserialize, Serialize};

pub use reader::{LogIter, LogReader};
pub use writer::{LogOptions, LogWriter};

use crate::error::{Error, Result};

/// One logged request.
///
/// Read back, its history's events carry ids and categorical features but no
/// dense ones and no values: the logs do not hold them.
#[derive(Debug, Clone)]
pub struct Logged {
    /// The request, its history cut to the short one of its own surface.
    pub example: Example,
    /// The targets' embeddings, row-major `[targets, tae_dim]`.
    pub tae: Vec<f32>,
    /// The FM version that made them.
    pub fm_version: String,
}

/// What holds for all files of a log directory: `log-manifest.json`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogManifest {
    /// Version of this layout.
    pub format: u32,
    /// Length of a target-aware embedding.
    pub tae_dim: usize,
    /// Events of short history at most.
    pub history_len: usize,
}

/// The layout that this version writes and reads.
const FORMAT: u32 = 1;

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
        let manifest: LogManifest =
            serde_json::from_str(&text).map_err(|error| Error::data(&path, error.to_string()))?;
        match manifest.format {
            FORMAT => Ok(manifest),
            other => Err(Error::data(
                &path,
                format!("log format {other}; this version reads format {FORMAT}"),
            )),
        }
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
