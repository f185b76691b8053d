//! Importers: from the files of published data sets to the directory that `dataset` reads.
//!
//! An importer reads what the authors published and decides nothing about models. A row that cannot
//! be used is counted and reported in `import-report.json`; a missing file or column ends the
//! import.

pub mod kuairand;
pub mod movielens;
mod ranges;
mod report;
pub mod simulate;
mod text;

use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

pub use ranges::InferredRange;
pub use report::{BadRow, FileReport, ImportReport};

use hypercast_fm::example::Outcome;

use crate::dataset::{Entities, Impression, content, write_dataset};
use crate::error::{Result, write_json};
use crate::schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole, ValueRange};

/// Where an import writes to, its optional file of content vectors, and when it began.
struct Destination<'a> {
    into: &'a Path,
    content: Option<&'a Path>,
    start: Instant,
}

/// Writes the data set, with ranges inferred from it, the content vectors and the report.
fn finish(
    destination: &Destination<'_>,
    entities: &Entities<'_>,
    mut impressions: Vec<Impression>,
    mut report: ImportReport,
) -> Result<ImportReport> {
    let &Destination { into, content, start } = destination;
    report.repeated = count_repeated(&impressions);
    report.count(&impressions);
    (report.items, report.users) = (entities.items.len() as u64, entities.users.len() as u64);
    if let Some(content) = content::import(content, into, entities.items)? {
        report.items_with_content = content.items.len() as u64;
        report.content_width = content.width as u64;
    }
    report.ranges = ranges::infer(entities, &impressions);
    let ranges = report.ranges.iter().map(|inferred| inferred.range.clone()).collect();
    let schema = &Schema { ranges, ..entities.schema.clone() };
    write_dataset(into, &Entities { schema, ..*entities }, &mut impressions)?;
    report.seconds = start.elapsed().as_secs_f64();
    write_json(&into.join("import-report.json"), &report)?;
    Ok(report)
}

/// How many impressions agree with an earlier one in all that the files said of them, as where two
/// files overlap. They count: published logs have such rows, too.
fn count_repeated(rows: &[Impression]) -> u64 {
    let told = |row: &Impression| {
        let Outcome { actions, known, values } = row.outcome;
        let shown = (row.user, row.item, row.surface, row.time_ms, row.outcome_ms);
        (shown, actions, known, values.map(f32::to_bits))
    };
    let mut seen = HashSet::with_capacity(rows.len());
    rows.iter().filter(|row| !seen.insert(told(row))).count() as u64
}

fn features(names: &[impl AsRef<str>], kind: FeatureKind) -> Vec<Feature> {
    names.iter().map(|name| Feature { name: name.as_ref().into(), kind }).collect()
}

/// Categorical features, then dense ones.
fn mixed_features(categorical: &[impl AsRef<str>], dense: &[&str]) -> Vec<Feature> {
    [features(categorical, FeatureKind::Categorical), features(dense, FeatureKind::Dense)].concat()
}

fn task(name: &str, role: TaskRole, kind: TaskKind) -> Task {
    Task { name: name.into(), role, kind, label: name.into(), surfaces: Vec::new(), weight: 1.0 }
}

fn range(name: &str, low: f32, high: f32) -> ValueRange {
    ValueRange { name: name.into(), low, high, ..ValueRange::default() }
}

/// A counter for each key and action, named after both without the columns' `_id`:
/// `user_surface_is_click`.
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

/// Sorts impressions by the time of their requests, and numbers the requests from 1 in that order.
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
