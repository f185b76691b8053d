//! From the files that a team has to the directory that `hypercast_data::dataset` reads.
//!
//! An importer reads what is there and decides nothing about models. A row that cannot be used is
//! counted and reported in `import-report.json`; a missing file or column ends the import.
//!
//! | module | content |
//! |---|---|
//! | [`events`] | bodies of `POST /v1/events` |
//! | [`infer`] | a first mapping, from what is in the files |
//! | [`mapping`] | any files, by a mapping of their columns |
//! | [`kuairand`], [`movielens`] | public data sets |

mod cell;
pub mod error;
pub mod events;
mod id_collector;
pub mod infer;
mod input;
pub mod kuairand;
pub mod mapping;
pub mod movielens;
mod ranges;
mod report;
mod requests;
mod sort;
mod sorted_dataset;
mod text;

use std::collections::HashSet;
use std::path::Path;
use std::time::Instant;

use hypercast_data::dataset::{Entities, Impression, content, write_dataset};
use hypercast_data::error::write_json;
use hypercast_data::schema::Schema;
use hypercast_fm::example::Outcome;

pub use cell::TimeUnit;
pub use error::{Error, Result};
pub use input::{FileFormat, InputOptions};
pub use ranges::InferredRange;
use ranges::RangeInference;
pub use report::{BadRow, FileReport, ImportReport};

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
    let mut inference = RangeInference::new(entities.schema);
    impressions.iter().for_each(|row| inference.see(row));
    report.ranges = inference.inferred(entities.items, entities.users);
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
