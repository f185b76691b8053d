//! The files that an import read, and the rows that it could not use.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::InferredRange;
use crate::error::{CommonErrors as _, Error, Result};

/// The number of bad rows that are printed. The report counts all.
const SHOWN: usize = 10;

/// The number of bad rows that the report's file has in full.
const KEPT: usize = 1000;

/// The most entries of a table of counts; what comes after them is counted under [`OTHERS`].
const MAX_COUNTS: usize = 1000;

/// The entry for what has none of its own.
const OTHERS: &str = "(others)";

/// The content of `import-report.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImportReport {
    /// The files in the order they were read.
    pub files: Vec<FileReport>,
    /// Rows that could not be used.
    pub bad_rows: u64,
    /// The number of bad rows by the column at fault, as `FILE: COLUMN`.
    pub bad_rows_by_column: BTreeMap<String, u64>,
    /// The number of bad rows by reason, in which `_` stands for what was in the cell.
    #[serde(default)]
    pub bad_rows_by_reason: BTreeMap<String, u64>,
    /// The first thousand bad rows.
    pub first_bad_rows: Vec<BadRow>,
    /// Impressions that say the same as an earlier one. They were written, too.
    #[serde(default)]
    pub repeated: u64,
    /// Impressions of items that no file of items has. They were written, too.
    #[serde(default)]
    pub of_unknown_items: u64,
    /// Impressions of users that no file of users has. They were written, too.
    #[serde(default)]
    pub of_unknown_users: u64,
    /// In how many rows a feature had more values than its `max_values`, by its name. The first
    /// ones were taken.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub cut_values: BTreeMap<String, u64>,
    /// Impressions with a time that has no zone, which counted as UTC.
    #[serde(default)]
    pub times_without_zone: u64,
    /// Events that led to nothing, by the reason.
    #[serde(default)]
    pub unused_events: BTreeMap<String, u64>,
    /// Impressions written, including history-only ones.
    pub impressions: u64,
    /// History-only impressions written.
    pub history_only: u64,
    /// Requests that the other impressions form.
    pub requests: u64,
    /// The number of items written.
    pub items: u64,
    /// The number of users written.
    pub users: u64,
    /// Items with a content vector.
    #[serde(default)]
    pub items_with_content: u64,
    /// The length of a content vector; 0 without any.
    #[serde(default)]
    pub content_width: u64,
    /// The ranges that were inferred and written to `schema.toml`.
    #[serde(default)]
    pub ranges: Vec<InferredRange>,
    /// The duration of the import.
    pub seconds: f64,
}

/// One file that was read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file's path.
    pub file: String,
    /// Rows without the header; for rows of lists, the lists' elements.
    pub rows: u64,
    /// Rows that could not be used.
    pub bad: u64,
}

/// One row that could not be used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BadRow {
    /// The file's path.
    pub file: String,
    /// The line, or the row of a Parquet file, counted from 1.
    pub line: u64,
    /// The column at fault; `(all)` if the row has too few or too many cells.
    pub column: String,
    /// The problem with its cell.
    pub reason: String,
}

/// The reason why a row cannot be used.
#[derive(Debug)]
pub(super) struct RowError {
    pub(super) column: String,
    pub(super) reason: String,
}

impl RowError {
    /// An error that is about the whole row.
    pub(super) fn of_line(reason: String) -> RowError {
        RowError { column: "(all)".into(), reason }
    }
}

/// Why reading stops at a row, or goes on behind it.
#[derive(Debug)]
pub(super) enum RowFailure {
    /// The row is left out.
    Row(RowError),
    /// The import ends.
    Import(Error),
}

impl From<RowError> for RowFailure {
    fn from(error: RowError) -> RowFailure {
        RowFailure::Row(error)
    }
}

impl From<Error> for RowFailure {
    fn from(error: Error) -> RowFailure {
        RowFailure::Import(error)
    }
}

/// A reason without what was in the cell: what is in backticks, and numbers.
fn class_of(reason: &str) -> String {
    let mut class = String::with_capacity(reason.len());
    for (at, part) in reason.split('`').enumerate() {
        if at % 2 == 1 {
            class.push('_');
            continue;
        }
        let mut in_number = false;
        for char in part.chars() {
            if !char.is_ascii_digit() {
                class.push(char);
            } else if !in_number {
                class.push('_');
            }
            in_number = char.is_ascii_digit();
        }
    }
    class
}

fn count_in(counts: &mut BTreeMap<String, u64>, entry: String) {
    let is_full = counts.len() >= MAX_COUNTS && !counts.contains_key(&entry);
    *counts.entry(if is_full { OTHERS.to_owned() } else { entry }).or_default() += 1;
}

impl ImportReport {
    /// Starts the report of a file.
    pub(super) fn open(&mut self, file: &str) {
        self.files.push(FileReport { file: file.to_string(), rows: 0, bad: 0 });
    }

    /// Counts a row of the file that was opened last.
    ///
    /// # Errors
    /// The row's failure ends the import.
    pub(super) fn row(
        &mut self,
        line: u64,
        outcome: std::result::Result<(), impl Into<RowFailure>>,
    ) -> Result<()> {
        let file = self.files.last_mut().expect("a file is open");
        file.rows += 1;
        let bad = match outcome.map_err(Into::into) {
            Ok(()) => return Ok(()),
            Err(RowFailure::Row(bad)) => bad,
            Err(RowFailure::Import(error)) => return Err(error),
        };
        file.bad += 1;
        self.bad_rows += 1;
        count_in(&mut self.bad_rows_by_column, format!("{}: {}", file.file, bad.column));
        let class = format!("{}: {}", bad.column, class_of(&bad.reason));
        count_in(&mut self.bad_rows_by_reason, class);
        if self.first_bad_rows.len() < KEPT {
            let (file, RowError { column, reason }) = (file.file.clone(), bad);
            self.first_bad_rows.push(BadRow { file, line, column, reason });
        }
        Ok(())
    }

    /// Whether the file that was opened last has had no row.
    pub(super) fn is_without_rows(&self) -> bool {
        self.files.last().is_some_and(|file| file.rows == 0)
    }

    /// Ends the file that was opened last.
    ///
    /// # Errors
    /// Every row is bad, so it is the wrong file.
    pub(super) fn close(&mut self) -> Result<()> {
        let file = self.files.last().expect("a file is open");
        if file.rows == 0 || file.bad < file.rows {
            return Ok(());
        }
        let first = self.first_bad_rows.iter().find(|bad| bad.file == file.file);
        let first = first.map_or(String::new(), |bad| {
            format!("; line {}, column `{}`: {}", bad.line, bad.column, bad.reason)
        });
        Err(Error::data(&file.file, format!("none of its {} rows can be used{first}", file.rows)))
    }
}

impl std::fmt::Display for ImportReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} impressions ({} of them history only) in {} requests, {} items, {} users, {:.1} s",
            self.impressions,
            self.history_only,
            self.requests,
            self.items,
            self.users,
            self.seconds
        )?;
        if self.content_width > 0 {
            let (with, items, width) = (self.items_with_content, self.items, self.content_width);
            writeln!(f, "{with} of {items} items have a content vector of {width} numbers")?;
        }
        if self.repeated > 0 {
            writeln!(
                f,
                "{} rows say the same as earlier ones and count all the same; do files overlap?",
                self.repeated
            )?;
        }
        if self.times_without_zone > 0 {
            writeln!(
                f,
                "{} times have no zone and count as UTC; write local ones with their offset, as \
                 2026-11-29T10:00:00+01:00",
                self.times_without_zone
            )?;
        }
        let unknown = [("items", self.of_unknown_items), ("users", self.of_unknown_users)];
        for (what, count) in unknown.into_iter().filter(|&(_, count)| count > 0) {
            writeln!(f, "{count} impressions are of {what} without features; they count, too")?;
        }
        for (feature, count) in &self.cut_values {
            writeln!(
                f,
                "{count} rows have more values of `{feature}` than its max_values; the first ones \
                 count"
            )?;
        }
        for (reason, count) in &self.unused_events {
            writeln!(f, "{count} events count for nothing: {reason}")?;
        }
        for inferred in &self.ranges {
            writeln!(f, "{inferred}")?;
        }
        if self.bad_rows > 0 {
            writeln!(f, "{} rows could not be used:", self.bad_rows)?;
            for bad in self.first_bad_rows.iter().take(SHOWN) {
                let BadRow { file, line, column, reason } = bad;
                writeln!(f, "  {file}:{line}: column `{column}`: {reason}")?;
            }
            if self.bad_rows > SHOWN as u64 {
                let more = self.bad_rows - SHOWN as u64;
                writeln!(f, "  ... and {more} more; the most frequent columns and reasons:")?;
                let mut reasons: Vec<(&String, &u64)> = self.bad_rows_by_reason.iter().collect();
                reasons.sort_by_key(|&(_, count)| std::cmp::Reverse(count));
                for (reason, count) in reasons.into_iter().take(SHOWN) {
                    writeln!(f, "  {count} x {reason}")?;
                }
            }
        }
        Ok(())
    }
}
