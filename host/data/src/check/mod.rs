//! What is wrong with a data set, before a model learns it: one pass over its rows, in memory that
//! does not grow with them.
//!
//! Some faults make a model look good and serve badly, such as rows out of order or a feature that
//! is known only after the outcome; others make it bad without a word. Each finding says what,
//! where, how often and what to do. [`admit`] is what everything that trains on a data set calls
//! first. The check reads what an import wrote, not a team's own files, and it mends nothing.
//!
//! | part | faults |
//! |---|---|
//! | `requests` | rows out of order, requests that are apart, mixed, repeated or very large |
//! | `times` | the unit and the years of times, outcomes before their impressions |
//! | `entities` | ids without features, features without ids, infinite features |
//! | `labels` | labels by task and surface, surfaces that move, drift of rates |
//! | `features` | drift of features |
//! | `leaks` | features that give a label away |

mod entities;
mod features;
mod finding;
mod labels;
mod leaks;
mod requests;
#[cfg(test)]
mod tests;
mod times;

use std::fmt::Write as _;

use hypercast_core::progress::Progress;

pub use self::finding::{CheckReport, Finding, FindingKind, LabelCount, Severity};
use crate::dataset::{Dataset, Impression};
use crate::error::{CommonErrors as _, Error, Result};

/// Rows between two advances of the progress.
const PROGRESS_ROWS: u64 = 1 << 16;

/// A row of a data set under check.
#[derive(Clone, Copy)]
struct CheckedRow<'a> {
    /// Counted from 1.
    number: u64,
    /// 0 for the first half of the rows that are not mere history, else 1.
    half: usize,
    impression: &'a Impression,
}

/// Checks a data set.
///
/// # Errors
/// A file is missing or cannot be read. Whatever can be read has findings instead.
pub fn check(dataset: &Dataset) -> Result<CheckReport> {
    let start = std::time::Instant::now();
    let reader = dataset.impressions()?.in_any_order();
    let (rows, shown_rows) = (reader.rows() as u64, reader.shown_rows()?);
    let mut progress = Progress::start("check", rows);
    let mut requests = requests::RequestCheck::default();
    let mut times = times::TimeCheck::new();
    let mut entities = entities::EntityCheck::new(dataset);
    let mut labels = labels::LabelCheck::new(dataset);
    let mut features = features::FeatureCheck::new(dataset, shown_rows);
    let (mut number, mut shown) = (0, 0);
    for impression in reader {
        let impression = impression?;
        let half = usize::from(shown >= shown_rows / 2);
        number += 1;
        let row = CheckedRow { number, half, impression: &impression };
        requests.see(row);
        times.see(row);
        entities.see(row);
        if !impression.history_only {
            shown += 1;
            labels.see(row);
            features.see(row);
        }
        if number % PROGRESS_ROWS == 0 {
            progress.advance(PROGRESS_ROWS, String::new);
        }
    }
    let is_sorted = requests.is_sorted();
    let mut findings = Vec::new();
    if rows == 0 {
        let what = "it has no row".to_owned();
        let finding =
            Finding::new(Severity::Refused, FindingKind::Empty, finding::IMPRESSIONS, what);
        findings.push(finding.advice("did the import leave out every row?"));
    }
    let (requests, first_ms, last_ms) = (requests.finish(&mut findings), times.first, times.last);
    times.finish(&mut findings);
    entities.finish(&mut findings)?;
    let labels = labels.finish(is_sorted, &mut findings);
    features.finish(is_sorted, &mut findings);
    findings.sort_by_key(|finding| (finding.severity, finding.kind));
    progress.finish(&format!("{rows} rows"));
    Ok(CheckReport {
        dir: dataset.dir.clone(),
        rows,
        history_only: rows - shown_rows,
        requests,
        first_ms,
        last_ms,
        items: dataset.items.len() as u64,
        users: dataset.users.len() as u64,
        labels,
        findings,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// Checks a data set on which something is to be trained, and logs what it warns of. With `force`,
/// it is used whatever was found, as far as that can be.
///
/// # Errors
/// What [`check`] fails at; refused if a finding is, unless forced.
pub fn admit(dataset: &Dataset, force: bool) -> Result<CheckReport> {
    let report = check(dataset)?;
    for finding in report.of(Severity::Warned) {
        tracing::warn!("{finding}");
    }
    let can_be_forced = report.of(Severity::Refused).all(|finding| finding.forced.is_some());
    if !report.is_refused() || force && can_be_forced {
        for finding in report.of(Severity::Refused) {
            let forced = finding.forced.as_deref().unwrap_or_default();
            tracing::warn!("forced: {finding}; {forced}");
        }
        return Ok(report);
    }
    let mut faults = String::new();
    for finding in report.of(Severity::Refused) {
        let _ = write!(faults, "\n  {finding}");
    }
    let way = if can_be_forced {
        "--force goes on all the same and says how"
    } else {
        "--force does not help against all of it"
    };
    let dir = dataset.dir.display();
    Err(Error::refused(format!(
        "training on {dir}, because:{faults}\n`hypercast data check {dir}` says more; {way}"
    )))
}
