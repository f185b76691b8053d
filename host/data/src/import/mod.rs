//! Importers: from a data set's own files to the directory that `dataset` reads.
//!
//! An importer reads what the data set's authors published and decides nothing
//! about models. A row that it cannot use is counted and named in
//! `import-report.json`; a missing file or column ends the import.

pub mod kuairand;
pub mod movielens;
mod report;
pub mod simulate;
mod text;

pub use report::{BadRow, FileReport, ImportReport};

use crate::dataset::Impression;
use crate::schema::{Counter, Feature, FeatureKind, Task, TaskKind, TaskRole};

fn features(names: &[&str], kind: FeatureKind) -> Vec<Feature> {
    names.iter().map(|&name| Feature { name: name.into(), kind }).collect()
}

fn task(name: &str, role: TaskRole, kind: TaskKind) -> Task {
    Task { name: name.into(), role, kind, label: name.into(), surfaces: Vec::new(), weight: 1.0 }
}

/// A counter a key and action, named after both: `user_surface_is_click`. Of the column's
/// names, `_id` is left out.
fn counters(keys: &[&[&str]], actions: &[&str]) -> Vec<Counter> {
    let named = |key: &[&str], action: &str| Counter {
        name: key
            .iter()
            .chain([&action])
            .map(|part| part.trim_end_matches("_id"))
            .collect::<Vec<_>>()
            .join("_"),
        key: key.iter().map(|column| column.to_string()).collect(),
        action: action.to_string(),
        half_life_days: 0.0,
    };
    keys.iter().flat_map(|key| actions.iter().map(move |action| named(key, action))).collect()
}

/// Sorts impressions by the time of their requests and numbers the requests from 1 in that order.
fn number_requests(rows: &mut [Impression]) {
    rows.sort_by_key(|row| (row.time_ms, row.request));
    let (mut number, mut last) = (0, None);
    for row in rows.iter_mut() {
        if last != Some(row.request) {
            last = Some(row.request);
            number += 1;
        }
        row.request = number;
    }
}
