//! Delimited text with a header: finds columns by name and hands out rows with
//! their line, so that whatever is wrong can be said with its place.

use std::borrow::Cow;
use std::io::Read;
use std::str::FromStr;

use csv::ByteRecord;

use super::report::{Bad, ImportReport};
use crate::error::{CommonErrors as _, Error, Result};

/// A file to read.
pub(super) struct TextFile<R> {
    /// Its name in messages.
    pub(super) name: String,
    /// Its bytes.
    pub(super) content: R,
    /// What is between two cells.
    pub(super) delimiter: u8,
    /// The columns wanted, in the order in which `Row` is asked for them.
    pub(super) columns: &'static [&'static str],
    /// What the file should be, for messages.
    pub(super) expected: &'static str,
}

/// One row.
pub(super) struct Row<'a> {
    record: &'a ByteRecord,
    positions: &'a [usize],
    columns: &'static [&'static str],
}

impl<R: Read> TextFile<R> {
    /// Calls `take` with every row and counts the rows that it refuses in `report`.
    pub(super) fn read(
        self,
        report: &mut ImportReport,
        mut take: impl FnMut(&Row<'_>) -> std::result::Result<(), Bad>,
    ) -> Result<()> {
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(self.delimiter)
            // Tab-separated files have no quoting: a quote in a title is a quote.
            .quoting(self.delimiter == b',')
            .flexible(true)
            // Lines are counted by their `\n`; a `\r` before it goes with the cell's white space.
            .terminator(csv::Terminator::Any(b'\n'))
            .from_reader(self.content);
        let unreadable = |error: csv::Error| Error::data(&self.name, error.to_string());
        let header = reader.byte_headers().map_err(unreadable)?.clone();
        let positions = self.columns.iter().map(|column| {
            let found = header.iter().position(|name| {
                String::from_utf8_lossy(name).trim_start_matches('\u{feff}').trim() == *column
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
            let row = Row { record: &record, positions: &positions, columns: self.columns };
            let outcome = match record.len() == header.len() {
                true => take(&row),
                false => Err(Bad {
                    column: "(all)",
                    reason: format!("{} cells, the header has {}", record.len(), header.len()),
                }),
            };
            report.row(line, outcome);
        }
        report.close()
    }
}

impl Row<'_> {
    /// The cell of the wanted column number `column`, trimmed; empty where the data says NaN.
    pub(super) fn text(&self, column: usize) -> Cow<'_, str> {
        let text = String::from_utf8_lossy(&self.record[self.positions[column]]);
        match text.trim() {
            "nan" | "NaN" => Cow::Borrowed(""),
            trimmed if trimmed.len() == text.len() => text,
            trimmed => Cow::Owned(trimmed.to_string()),
        }
    }

    /// The cell as a number.
    pub(super) fn number<T: FromStr>(&self, column: usize) -> std::result::Result<T, Bad> {
        let text = self.text(column);
        text.parse()
            .map_err(|_| self.bad(column, format!("`{text}` is no {}", std::any::type_name::<T>())))
    }

    /// The cell as a finite number, `None` where it is empty.
    pub(super) fn optional(&self, column: usize) -> std::result::Result<Option<f32>, Bad> {
        if self.text(column).is_empty() {
            return Ok(None);
        }
        let number: f32 = self.number(column)?;
        if number.is_finite() {
            Ok(Some(number))
        } else {
            Err(self.bad(column, format!("{number} is not finite")))
        }
    }

    /// The cell as 0 or 1.
    pub(super) fn flag(&self, column: usize) -> std::result::Result<bool, Bad> {
        match self.text(column).as_ref() {
            "0" => Ok(false),
            "1" => Ok(true),
            other => Err(self.bad(column, format!("`{other}` is neither 0 nor 1"))),
        }
    }

    /// A complaint about a column.
    pub(super) fn bad(&self, column: usize, reason: String) -> Bad {
        Bad { column: self.columns[column], reason }
    }
}
