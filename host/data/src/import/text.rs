//! Delimited text with a header: finds columns by name and yields rows with their line numbers, so
//! that errors can name the place.

use std::borrow::Cow;
use std::io::Read;
use std::str::FromStr;

use csv::ByteRecord;

use super::report::{ImportReport, RowError};
use crate::error::{CommonErrors as _, Error, Result};

/// A file to read.
pub(super) struct TextFile<R> {
    /// Its name in messages.
    pub(super) name: String,
    pub(super) content: R,
    /// The byte between two cells.
    pub(super) delimiter: u8,
    /// The columns to read; a [`TextRow`] refers to them by index.
    pub(super) columns: Vec<String>,
    /// A description of the right file, for messages.
    pub(super) expected: &'static str,
}

/// The cells of one row.
pub(super) struct TextRow<'a> {
    record: &'a ByteRecord,
    positions: &'a [usize],
    columns: &'a [String],
}

impl<R: Read> TextFile<R> {
    /// Calls `add` with every row, and counts the rows that it refuses in `report`.
    pub(super) fn read(
        self,
        report: &mut ImportReport,
        mut add: impl FnMut(&TextRow<'_>) -> std::result::Result<(), RowError>,
    ) -> Result<()> {
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(self.delimiter)
            // Tab-separated files have no quoting: a quote in a title is part of it.
            .quoting(self.delimiter == b',')
            .flexible(true)
            // Lines end with `\n`; a `\r` before it is trimmed with the cell's white space.
            .terminator(csv::Terminator::Any(b'\n'))
            .from_reader(self.content);
        let unreadable = |error: csv::Error| Error::data(&self.name, error.to_string());
        let header = reader.byte_headers().map_err(unreadable)?.clone();
        let positions = self.columns.iter().map(|column| {
            let found = header.iter().position(|name| {
                String::from_utf8_lossy(name).trim_start_matches('\u{feff}').trim() == column
            });
            found.ok_or_else(|| {
                Error::data(
                    &self.name,
                    format!("column `{column}` is missing; expected {}", self.expected),
                )
            })
        });
        let positions = positions.collect::<Result<Vec<usize>>>()?;
        report.open(&self.name);
        let mut record = ByteRecord::new();
        while reader.read_byte_record(&mut record).map_err(unreadable)? {
            let line = record.position().map_or(0, csv::Position::line);
            let row = TextRow { record: &record, positions: &positions, columns: &self.columns };
            let outcome = if record.len() == header.len() {
                add(&row)
            } else {
                let reason = format!("{} cells, the header has {}", record.len(), header.len());
                Err(RowError { column: "(all)".into(), reason })
            };
            report.row(line, outcome);
        }
        report.close()
    }
}

impl TextRow<'_> {
    /// The trimmed cell of column `column` of [`TextFile::columns`]; empty for NaN.
    pub(super) fn text(&self, column: usize) -> Cow<'_, str> {
        let text = String::from_utf8_lossy(&self.record[self.positions[column]]);
        match text.trim() {
            "nan" | "NaN" => Cow::Borrowed(""),
            trimmed if trimmed.len() == text.len() => text,
            trimmed => Cow::Owned(trimmed.to_string()),
        }
    }

    /// The cell as a number of any type.
    pub(super) fn number<T: FromStr>(&self, column: usize) -> std::result::Result<T, RowError> {
        let text = self.text(column);
        text.parse().map_err(|_| {
            self.bad(column, format!("`{text}` is not a valid {}", std::any::type_name::<T>()))
        })
    }

    /// The cell as a finite number, `None` if it is empty.
    pub(super) fn optional(&self, column: usize) -> std::result::Result<Option<f32>, RowError> {
        if self.text(column).is_empty() {
            return Ok(None);
        }
        let number: f32 = self.number(column)?;
        if !number.is_finite() {
            return Err(self.bad(column, format!("{number} is not finite")));
        }
        Ok(Some(number))
    }

    /// The cell as 0 or 1.
    pub(super) fn flag(&self, column: usize) -> std::result::Result<bool, RowError> {
        match self.text(column).as_ref() {
            "0" => Ok(false),
            "1" => Ok(true),
            other => Err(self.bad(column, format!("`{other}` is neither 0 nor 1"))),
        }
    }

    /// An error that names a column.
    pub(super) fn bad(&self, column: usize, reason: String) -> RowError {
        RowError { column: self.columns[column].clone(), reason }
    }
}
