//! The files that an import read, and the rows that it could not use.

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use super::InferredRange;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::Impression;

/// The number of bad rows that the report shows; it counts all.
const SHOWN: usize = 10;

/// The content of `import-report.json`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ImportReport {
    /// The files in the order they were read.
    pub files: Vec<FileReport>,
    /// Rows that could not be used.
    pub bad_rows: u64,
    /// The number of bad rows by the column at fault, as `FILE: COLUMN`.
    pub bad_rows_by_column: BTreeMap<String, u64>,
    /// The first ten bad rows.
    pub first_bad_rows: Vec<BadRow>,
    /// Impressions that say the same as an earlier one. They were written, too.
    #[serde(default)]
    pub repeated: u64,
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

impl ImportReport {
    /// Starts the report of a file.
    pub(super) fn open(&mut self, file: &str) {
        self.files.push(FileReport { file: file.to_string(), rows: 0, bad: 0 });
    }

    /// Counts a row of the file that was opened last.
    pub(super) fn row(&mut self, line: u64, outcome: std::result::Result<(), RowError>) {
        let file = self.files.last_mut().expect("a file is open");
        file.rows += 1;
        if let Err(bad) = outcome {
            file.bad += 1;
            self.bad_rows += 1;
            *self
                .bad_rows_by_column
                .entry(format!("{}: {}", file.file, bad.column))
                .or_default() += 1;
            if self.first_bad_rows.len() < SHOWN {
                let (file, RowError { column, reason }) = (file.file.clone(), bad);
                self.first_bad_rows.push(BadRow { file, line, column, reason });
            }
        }
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

    /// Counts impressions and requests.
    pub(super) fn count(&mut self, rows: &[Impression]) {
        self.impressions = rows.len() as u64;
        self.history_only = rows.iter().filter(|row| row.history_only).count() as u64;
        let requests: HashSet<u64> =
            rows.iter().filter(|row| !row.history_only).map(|row| row.request).collect();
        self.requests = requests.len() as u64;
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
        for inferred in &self.ranges {
            writeln!(f, "{inferred}")?;
        }
        if self.bad_rows > 0 {
            writeln!(f, "{} rows could not be used:", self.bad_rows)?;
            for bad in &self.first_bad_rows {
                writeln!(
                    f,
                    "  {}:{}: column `{}`: {}",
                    bad.file, bad.line, bad.column, bad.reason
                )?;
            }
            if self.bad_rows > self.first_bad_rows.len() as u64 {
                writeln!(f, "  ... and {} more", self.bad_rows - self.first_bad_rows.len() as u64)?;
            }
        }
        Ok(())
    }
}
