//! Materialising: a finished FM's TAEs of served items, and its predictions, into feature logs.
//!
//! `train fm` logs the TAEs of its own stream; this does the same for any stretch of a data set
//! with any checkpoint, in big batches and without learning. It is what the logging tier
//! ([`crate::logging`]) does with the stream of joined examples (paper section 3.3.3).

use std::path::Path;

use hypercast_fm::inference::{self, FmServingOptions};

use crate::error::Result;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_core::dir_lock::DirLock;
use hypercast_core::progress::Progress;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::logs::LogVersion;
use hypercast_data::schema::{CoreColumns, MainTasks, spec_growths};

/// Requests a forward pass: latency does not matter here.
const BATCH: usize = 128;

/// Writes logs of the past (up to `timeline.until`) with the TAEs of a checkpoint into a folder,
/// which is replaced.
///
/// # Errors
/// As [`materialise`].
pub fn past(dataset: &Dataset, config: &Config, checkpoint: &Path, logs: &Path) -> Result<u64> {
    atomic_dir::remove(logs)?;
    let mut config = config.clone();
    config.paths.fm = checkpoint.to_path_buf();
    config.paths.logs = logs.to_path_buf();
    let span = Span { from_ms: None, until_ms: config.timeline.until_ms()? };
    materialise(dataset, &config, span)
}

/// Writes the logs of `span` into the configured folder, beside what is there; returns the rows.
///
/// # Errors
/// A data set, checkpoint or log folder that cannot be used.
pub fn materialise(dataset: &Dataset, config: &Config, span: Span) -> Result<u64> {
    let _owner = DirLock::acquire(&config.paths.logs)?;
    let growths = spec_growths(&dataset.schema)?.into();
    let serving = FmServingOptions { growths, ..config.fm_logging.loading(config.device) };
    let fm = inference::load(&config.paths.fm, serving)?;
    let manifest = fm.manifest().clone();
    let versions = vec![LogVersion::new(&manifest.version, manifest.config.tae_width())];
    let mut log = super::fm::log_writer(dataset, config, versions)?;
    let history_len = manifest.config.max_history;
    let max_targets = manifest.config.max_targets;
    let options = ReplayOptions { history_len, max_targets, ..config.replay(span) };
    let core = CoreColumns::new(&dataset.schema);
    let main_tasks = MainTasks::new(&dataset.schema);
    let mut progress = Progress::start("materialise", dataset.rows as u64);
    let (mut batch, mut rows) = (Vec::with_capacity(BATCH), 0);
    let mut examples = Replay::new(dataset, options)?.peekable();
    while let Some(example) = examples.next() {
        batch.push(example?);
        if batch.len() == BATCH || examples.peek().is_none() {
            let shown = core.examples(&batch);
            let said = fm.infer(&shown.iter().map(|example| &**example).collect::<Vec<_>>())?;
            let said = main_tasks.output(&manifest.spec, said);
            let written = log.write_batch(&batch, &said, |_| true)?;
            rows += written;
            batch.clear();
            progress.advance(written, String::new);
        }
    }
    log.finish()?;
    progress.finish(&format!("{rows} rows logged with the TAE of FM {}", manifest.version));
    Ok(rows)
}
