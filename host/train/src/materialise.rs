//! Materialising: a finished FM's TAEs of served items, and its predictions, into feature logs.
//!
//! `train fm` logs the TAEs of its own stream; this does the same for a stretch of a data set that
//! a checkpoint has not learned from, in big batches and without learning. It is what the logging
//! tier ([`crate::logging`]) does with the stream of joined examples (paper section 3.3.3).

use std::path::Path;

use crate::checkpoint_embedder::CheckpointEmbedder;
pub use crate::checkpoint_embedder::EmbeddingCheckpoint;
use crate::error::Result;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::logs::LogVersion;

/// Requests a forward pass: latency does not matter here.
const BATCH: usize = 128;

/// Writes logs of the past (up to `timeline.until`) with the TAEs of a checkpoint into a folder,
/// which is replaced.
///
/// # Errors
/// As [`materialise`].
pub fn past(
    dataset: &Dataset,
    config: &Config,
    checkpoint: &EmbeddingCheckpoint,
    logs: &Path,
) -> Result<u64> {
    atomic_dir::remove(logs)?;
    let mut config = config.clone();
    config.paths.logs = logs.to_path_buf();
    let until_ms = config.timeline.until_ms()?;
    materialise(dataset, &config, checkpoint, until_ms)
}

/// Writes logs with the TAEs of a checkpoint into the configured folder, beside what is there;
/// returns the rows.
///
/// # Errors
/// A data set, checkpoint or log folder that cannot be used; a checkpoint that may have learned
/// from what it is to embed.
pub fn materialise(
    dataset: &Dataset,
    config: &Config,
    checkpoint: &EmbeddingCheckpoint,
    until_ms: Option<i64>,
) -> Result<u64> {
    let _owner = DirLock::acquire(&config.paths.logs)?;
    let fm = CheckpointEmbedder::load(dataset, config, checkpoint)?;
    let manifest = fm.manifest().clone();
    let history_len = manifest.config.max_history;
    let max_targets = manifest.config.max_targets;
    let span = Span { from_ms: checkpoint.from_ms, until_ms };
    let options = ReplayOptions { history_len, max_targets, ..config.replay(span) };
    let mut examples = Replay::new(dataset, options)?.peekable();
    // Before anything is written: the first request is the oldest.
    if let Some(Ok(first)) = examples.peek()
        && fm.looks_ahead(first)
    {
        return Err(fm.look_ahead(first));
    }
    let versions = vec![LogVersion::new(&manifest.version, manifest.config.tae_width())];
    let mut log = super::fm::log_writer(dataset, config, versions)?;
    let mut progress = Progress::start("materialise", dataset.rows as u64);
    let (mut batch, mut rows) = (Vec::with_capacity(BATCH), 0);
    while let Some(example) = examples.next() {
        batch.push(example?);
        if batch.len() == BATCH || examples.peek().is_none() {
            let written = log.write_batch(&batch, &[fm.embed(&batch)?], |_| true)?;
            rows += written;
            batch.clear();
            progress.advance(written, String::new);
        }
    }
    log.finish()?;
    progress.finish(&format!("{rows} rows logged with the TAE of FM {}", manifest.version));
    Ok(rows)
}
