//! KuaiRand-Pure (Gao et al., CIKM 2022): the published files become a data set directory. Surfaces
//! are the app's tabs.
//!
//! The optional `user_history_*.parquet` contains what users saw before the logs start, without
//! exact times and tabs. It becomes history-only impressions on the surface `unknown`, one hour
//! apart, of which the newest has its true time.

mod entities;
mod log;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use crate::error::{CommonErrors as _, Error, Result};
use crate::{Destination, ImportReport, finish, number_requests};
use hypercast_data::dataset::{Entities, Impression};
use hypercast_data::schema::{Counter, Feature, Schema, Task, TaskKind, TaskRole};

/// Impressions of one user and tab within this time of the first one form one request.
const REQUEST_MS: i64 = 2_000;

/// Actions in the order of their bits; the columns of the log have the same names.
const ACTIONS: [&str; 8] = [
    "is_click",
    "long_view",
    "is_like",
    "is_profile_enter",
    "is_follow",
    "is_comment",
    "is_forward",
    "is_hate",
];

/// Options of an import of KuaiRand-Pure.
#[derive(Debug, Clone)]
pub struct KuairandOptions {
    /// The folder with the published files.
    pub from: PathBuf,
    /// The data set directory to write.
    pub into: PathBuf,
    /// A file with content vectors of the videos (see `dataset::content`).
    pub content: Option<PathBuf>,
}

/// Imports KuaiRand-Pure.
///
/// # Errors
/// A file or a column is missing, or a file has no usable row.
pub fn import(options: &KuairandOptions) -> Result<ImportReport> {
    let start = Instant::now();
    let mut report = ImportReport::default();
    let from = &options.from;
    let logs = matching(from, "log_standard_", "_pure.csv")?;
    if logs.is_empty() {
        let reason = "it has no log_standard_*_pure.csv; expected the folder with the files of \
                      KuaiRand-Pure";
        return Err(Error::data(from, reason));
    }
    let users = entities::read_users(&from.join("user_features_pure.csv"), &mut report)?;
    let mut videos =
        entities::read_videos(&from.join("video_features_basic_pure.csv"), &mut report)?;
    let mut rows = Vec::new();
    let mut reader = log::KuairandReader {
        users: &users,
        videos: &mut videos,
        rows: &mut rows,
        report: &mut report,
    };
    for path in &logs {
        reader.read_log(path)?;
    }
    for path in matching(from, "user_history_", ".parquet")? {
        reader.read_history(&path)?;
    }
    let tabs: BTreeSet<u16> =
        rows.iter().filter(|row| !row.history_only).map(|row| row.surface).collect();
    let schema = schema(&tabs);
    name_surfaces(&mut rows, &tabs);
    form_requests(&mut rows);
    let items = entities::items(&videos);
    let users: Vec<_> = users.into_values().collect();
    let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &users };
    let KuairandOptions { into, content, .. } = options;
    let destination = Destination { into, content: content.as_deref(), start };
    finish(&destination, &entities, rows, report)
}

/// The files in `dir` whose names start with `prefix` and end with `suffix`, sorted.
fn matching(dir: &Path, prefix: &str, suffix: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with(prefix) && name.ends_with(suffix) {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn schema(tabs: &BTreeSet<u16>) -> Schema {
    let keys: [&[&str]; 12] = [
        &["user_id"],
        &["item_id"],
        &["author_id"],
        &["tag"],
        &["music_id"],
        &["duration_step", "surface"],
        &["tag", "surface"],
        &["user_id", "duration_step"],
        &["user_id", "surface"],
        &["item_id", "surface"],
        &["user_id", "tag"],
        &["user_id", "author_id"],
    ];
    let mut all_counters = Counter::lasting(&keys, &["is_click", "long_view"]);
    all_counters.extend(Counter::lasting(&keys[..3], &["is_like", "is_profile_enter"]));
    let recent = |counter: Counter| Counter {
        name: format!("recent_{}", counter.name),
        half_life_days: 1.0,
        ..counter
    };
    let moving: [&[&str]; 3] = [&["user_id"], &["item_id"], &["surface", "hour"]];
    all_counters
        .extend(Counter::lasting(&moving, &["is_click", "long_view"]).into_iter().map(recent));
    let main = |name| Task::of_label(name, TaskRole::Main, TaskKind::Binary);
    Schema {
        surfaces: std::iter::once("unknown".into())
            .chain(tabs.iter().map(|tab| format!("tab{tab}")))
            .collect(),
        actions: ACTIONS.map(String::from).to_vec(),
        values: vec!["watch_ratio".into()],
        tasks: vec![
            main("is_click"),
            main("long_view"),
            main("is_like"),
            Task::of_label("is_profile_enter", TaskRole::Auxiliary, TaskKind::Binary),
            Task::of_label("watch_ratio", TaskRole::Auxiliary, TaskKind::Regression),
        ],
        item_features: Feature::mixed(&entities::ITEM_CATEGORIES, &entities::ITEM_DENSE),
        user_features: Feature::mixed(&entities::user_categories(), &entities::USER_DENSE),
        context_features: Vec::new(),
        counters: all_counters,
        ids: Default::default(),
        ranges: Vec::new(),
    }
}

/// Turns tab numbers into indices of the schema's surfaces.
fn name_surfaces(rows: &mut [Impression], tabs: &BTreeSet<u16>) {
    for row in rows {
        row.surface =
            if row.history_only { 0 } else { 1 + tabs.range(..row.surface).count() as u16 };
    }
}

/// Combines impressions of one user and surface that are close together into a request, which has
/// the time of the first, and numbers the requests in time order.
fn form_requests(rows: &mut [Impression]) {
    rows.sort_by_key(|row| (row.history_only, row.user, row.surface, row.time_ms));
    let mut request = 0;
    let mut first = None;
    for row in rows.iter_mut() {
        let place = (row.history_only, row.user, row.surface);
        match first {
            Some((of, start_ms))
                if !row.history_only && of == place && row.time_ms - start_ms <= REQUEST_MS =>
            {
                row.time_ms = start_ms;
            }
            _ => {
                first = Some((place, row.time_ms));
                request += 1;
            }
        }
        row.request = request;
    }
    number_requests(rows);
}

#[cfg(test)]
mod tests;
