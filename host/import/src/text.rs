//! Delimited text with a header: finds columns by name and yields rows with their line numbers, so
//! that errors can name the place.
//!
//! A row is one line, so a quote that is never closed costs its own line and no other.

use std::borrow::Cow;
use std::io::{BufRead, BufReader, Read};

use csv_core::{ReadRecordResult, Reader, ReaderBuilder};

use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::input::Row;
use crate::report::{ImportReport, RowError, RowFailure};

/// The longest line; a longer one is a bad row.
const MAX_LINE_BYTES: usize = 1 << 20;

/// A file to read.
pub(super) struct TextFile<R> {
    /// Its name in messages.
    pub(super) name: String,
    pub(super) content: R,
    /// The byte between two cells.
    pub(super) delimiter: u8,
    /// Whether a cell may stand in quotes. Tab-separated files mostly have none: a quote in a title
    /// is part of it.
    pub(super) quoting: bool,
    /// The columns to read; a row refers to them by index.
    pub(super) columns: Vec<String>,
    /// The most rows that are read.
    pub(super) most_rows: u64,
}

/// The cells of one row.
struct TextRow<'a> {
    cells: &'a Cells,
    positions: &'a [usize],
}

impl<R: Read> TextFile<R> {
    /// Calls `add` with every row, and counts the rows that it refuses in `report`.
    ///
    /// # Errors
    /// The file is no text with a header of the columns, no row can be used, or `add` ends the
    /// import.
    pub(super) fn read(
        self,
        report: &mut ImportReport,
        mut add: impl FnMut(&dyn Row) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        let mut lines = Lines::new(self.content);
        let mut cells = Cells::new(self.delimiter, self.quoting);
        let damaged = |reason: String| Error::data(&self.name, reason);
        let cut = |error: std::io::Error| damaged(unreadable(&error));
        let wrong = |reason: &str| damaged(format!("{reason}; expected a text with a header"));
        if !lines.next().map_err(cut)? {
            return Err(wrong("the file is empty"));
        }
        if let Some(reason) = foreign_format(&lines.line) {
            return Err(wrong(reason));
        }
        lines.parse(&mut cells).map_err(|reason| damaged(format!("line 1: {reason}")))?;
        let header: Vec<String> = (0..cells.len()).map(|cell| cells.text(cell).into()).collect();
        let positions = self.columns.iter().map(|column| {
            let is_column = |name: &String| name.trim() == column;
            let found = header.iter().position(is_column);
            if header.iter().filter(|&name| is_column(name)).count() > 1 {
                let reason = "stands twice in the header; rename or remove one of them";
                return Err(damaged(format!("column `{column}` {reason}")));
            }
            found.ok_or_else(|| {
                let hint = other_delimiter(&header, self.delimiter);
                let has = header.join(", ");
                wrong(&format!("column `{column}` is missing{hint}; the file has {has}"))
            })
        });
        let positions = positions.collect::<Result<Vec<usize>>>()?;
        report.open(&self.name);
        let mut rows = 0;
        for line in 2.. {
            let more = lines.next().map_err(cut)?;
            if !more || rows == self.most_rows {
                break;
            }
            if matches!(lines.line.as_slice(), b"\n" | b"\r\n") {
                continue;
            }
            rows += 1;
            let outcome = match lines.parse(&mut cells) {
                Ok(()) if cells.are(&header) => {
                    let reason = "it is the header again; were several files put together?";
                    Err(RowError::of_line(reason.to_owned()).into())
                }
                Ok(()) if cells.len() == header.len() => {
                    add(&TextRow { cells: &cells, positions: &positions })
                }
                Ok(()) => {
                    let reason = format!("{} cells, the header has {}", cells.len(), header.len());
                    Err(RowError::of_line(reason).into())
                }
                Err(reason) => Err(RowError::of_line(reason).into()),
            };
            report.row(line, outcome)?;
        }
        if report.is_without_rows() {
            return Err(wrong("the file has a header and no rows"));
        }
        report.close()
    }
}

/// Why a file's content cannot be read on.
pub(super) fn unreadable(error: &std::io::Error) -> String {
    format!("{error}; is the file complete?")
}

/// Says what a file is that is no text in UTF-8 or Latin-1, from its first line.
fn foreign_format(start: &[u8]) -> Option<&'static str> {
    match start {
        [0x1f, 0x8b, ..] => Some("the file is compressed with gzip; decompress it first"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            Some("the file is compressed with zstd; decompress it first")
        }
        [b'P', b'K', 3, 4, ..] => Some("the file is a zip archive; unpack it first"),
        [b'P', b'A', b'R', b'1', ..] => Some("the file is Parquet, not text"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("the file is UTF-16; convert it to UTF-8"),
        _ if start.contains(&0) => Some("the file is binary, not text"),
        _ if start.trim_ascii_end().contains(&b'\r') => {
            Some("its lines end with CR alone; convert it to LF or CR LF")
        }
        _ => None,
    }
}

/// A hint for a header of one cell that another delimiter would split.
fn other_delimiter(header: &[String], own: u8) -> String {
    let [cell] = header else { return String::new() };
    let others = [(',', "commas"), (';', "semicolons"), ('\t', "tabs"), ('|', "bars")];
    let found = others.iter().find(|(other, _)| *other != char::from(own) && cell.contains(*other));
    found.map_or_else(String::new, |(_, name)| format!(" (its cells seem to be between {name})"))
}

/// The names of a text file's columns, from its first line.
///
/// # Errors
/// The file is empty or no text, or a quote is not closed.
pub(super) fn column_names(
    content: impl Read,
    delimiter: u8,
    quoting: bool,
) -> std::result::Result<Vec<String>, String> {
    let mut lines = Lines::new(content);
    if !lines.next().map_err(|error| unreadable(&error))? {
        return Err("the file is empty".to_owned());
    }
    if let Some(reason) = foreign_format(&lines.line) {
        return Err(reason.to_owned());
    }
    let mut cells = Cells::new(delimiter, quoting);
    lines.parse(&mut cells)?;
    let name = |cell| cells.text(cell).trim().to_owned();
    let names: Vec<String> = (0..cells.len()).map(name).collect();
    match other_delimiter(&names, delimiter) {
        hint if hint.is_empty() => Ok(names),
        hint => Err(format!("it has one column{hint}; set the delimiter")),
    }
}

/// What a text in UTF-8 may begin with, as Windows writes it.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The lines of a file, of which no more than [`MAX_LINE_BYTES`] are kept.
pub(super) struct Lines<R> {
    content: BufReader<R>,
    is_begun: bool,
    /// The current line with its end; cut if it is too long.
    pub(super) line: Vec<u8>,
}

impl<R: Read> Lines<R> {
    /// The lines of `content`, before the first one.
    pub(super) fn new(content: R) -> Lines<R> {
        Lines { content: BufReader::new(content), is_begun: false, line: Vec::new() }
    }

    /// Reads the next line; `false` at the end of the file.
    pub(super) fn next(&mut self) -> std::io::Result<bool> {
        self.line.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        self.content.by_ref().take(limit).read_until(b'\n', &mut self.line)?;
        if self.is_cut() {
            self.content.skip_until(b'\n')?;
        } else if !self.line.is_empty() && !self.line.ends_with(b"\n") {
            // The last line of a file may lack its end.
            self.line.push(b'\n');
        }
        let is_first = !std::mem::replace(&mut self.is_begun, true);
        if is_first && self.line.starts_with(BYTE_ORDER_MARK) {
            self.line.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(!self.line.is_empty())
    }

    /// The current line, or why it cannot be used.
    pub(super) fn whole(&self) -> std::result::Result<&[u8], String> {
        if self.is_cut() {
            return Err(format!("the line is longer than {MAX_LINE_BYTES} bytes"));
        }
        Ok(&self.line)
    }

    fn is_cut(&self) -> bool {
        self.line.len() > MAX_LINE_BYTES && !self.line.ends_with(b"\n")
    }

    /// Splits the current line into cells, or says why it cannot be split.
    fn parse(&self, cells: &mut Cells) -> std::result::Result<(), String> {
        cells.parse(self.whole()?)
    }
}

/// The cells of a line, and what splits it.
struct Cells {
    reader: Reader,
    bytes: Vec<u8>,
    /// Where each cell ends in `bytes`, as far as `len`.
    ends: Vec<usize>,
    len: usize,
}

impl Cells {
    fn new(delimiter: u8, quoting: bool) -> Self {
        let reader = ReaderBuilder::new()
            .delimiter(delimiter)
            .quoting(quoting)
            // A `\r` before the end is trimmed with the cell's white space.
            .terminator(csv_core::Terminator::Any(b'\n'))
            .build();
        Self { reader, bytes: Vec::new(), ends: Vec::new(), len: 0 }
    }

    fn len(&self) -> usize {
        self.len
    }

    fn parse(&mut self, line: &[u8]) -> std::result::Result<(), String> {
        // No line has more cells than bytes.
        self.bytes.resize(line.len(), 0);
        self.ends.resize(line.len(), 0);
        self.reader.reset();
        let (state, _, _, cells) = self.reader.read_record(line, &mut self.bytes, &mut self.ends);
        self.len = cells;
        match state {
            ReadRecordResult::Record => Ok(()),
            // Only a quoted cell takes in the end of its line.
            _ => {
                Err("a quote is not closed in its line; a cell cannot have a line break".to_owned())
            }
        }
    }

    /// Whether the cells say the same as others.
    fn are(&self, others: &[String]) -> bool {
        let is = |(cell, other): (usize, &String)| self.text(cell) == *other;
        self.len == others.len() && others.iter().enumerate().all(is)
    }

    /// A cell as text: UTF-8, or Latin-1 where it is none, so that different bytes stay different.
    fn text(&self, cell: usize) -> Cow<'_, str> {
        let start = cell.checked_sub(1).map_or(0, |before| self.ends[before]);
        let bytes = &self.bytes[start..self.ends[cell]];
        match std::str::from_utf8(bytes) {
            Ok(text) => Cow::Borrowed(text),
            Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect::<String>().into(),
        }
    }
}

impl Row for TextRow<'_> {
    fn cell(&self, column: usize) -> Cell<'_> {
        Cell::of_text(self.cells.text(self.positions[column]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first two cells of each good row, and the report.
    fn read(content: &[u8], delimiter: u8) -> (Result<()>, Vec<[String; 2]>, ImportReport) {
        let (mut report, mut rows) = (ImportReport::default(), Vec::new());
        let file = TextFile {
            name: "f.csv".to_owned(),
            content,
            delimiter,
            quoting: delimiter == b',',
            most_rows: u64::MAX,
            columns: vec!["a".to_owned(), "b".to_owned()],
        };
        let read = file.read(&mut report, |row| {
            let text = |column| row.cell(column).text().unwrap().unwrap_or_default().into_owned();
            rows.push([text(0), text(1)]);
            Ok(())
        });
        (read, rows, report)
    }

    #[test]
    fn a_quote_that_is_never_closed_costs_its_own_line() {
        let text = b"\xef\xbb\xbfa,b\r\n1,\"x, y\"\r\n\r\n2,\"z\r\n3,w\r\n4,\"say \"\"hi\"\"\"";
        let (read, rows, report) = read(text, b',');
        read.unwrap();
        assert_eq!(rows, [["1", "x, y"], ["3", "w"], ["4", "say \"hi\""]]);
        let bad = &report.first_bad_rows[0];
        assert_eq!((report.bad_rows, bad.line), (1, 4));
        assert!(bad.reason.contains("quote"), "{}", bad.reason);
    }

    #[test]
    fn a_line_that_is_too_long_is_a_bad_row() {
        let mut text = b"a,b\n1,x\n".to_vec();
        text.extend(std::iter::repeat_n(b'y', 3 * MAX_LINE_BYTES));
        text.extend(b"\n2,z\n");
        let (read, rows, report) = read(&text, b',');
        read.unwrap();
        assert_eq!(rows, [["1", "x"], ["2", "z"]]);
        assert!(report.first_bad_rows[0].reason.contains("longer"), "{report}");
    }

    #[test]
    fn bytes_that_are_no_utf_8_are_latin_1() {
        let (_, rows, _) = read(b"a\tb\nCaf\xe9\t1\nCaf\xe8\t\"2\nCaf\xc3\xa9\t3\n", b'\t');
        let names: Vec<&str> = rows.iter().map(|[name, _]| name.as_str()).collect();
        assert_eq!(names, ["Caf\u{e9}", "Caf\u{e8}", "Caf\u{e9}"]);
        assert_eq!(rows[1][1], "\"2", "tab-separated files have no quoting");
    }

    #[test]
    fn columns_are_found_by_name_and_blanks_are_trimmed() {
        let (read, rows, _) = read(b" b , x,a \r\n2 ,7, 1\t\r\n4,8,3\r\n", b',');
        read.unwrap();
        assert_eq!(rows, [["1", "2"], ["3", "4"]]);
    }

    #[test]
    fn a_file_that_was_cut_loses_its_last_row_alone() {
        let (read, rows, report) = read(b"a,b\n1,2\n3,4\n5", b',');
        read.unwrap();
        assert_eq!(rows, [["1", "2"], ["3", "4"]]);
        assert_eq!((report.bad_rows, report.first_bad_rows[0].line), (1, 4));
    }

    #[test]
    fn files_that_are_no_text_are_named() {
        for (content, word) in [
            (&b"\x1f\x8b\x08\x00"[..], "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"PK\x03\x04", "zip"),
            (b"PAR1", "Parquet"),
            (b"\xff\xfea\x00,\x00", "UTF-16"),
            (b"a\x00b", "binary"),
            (b"", "empty"),
            (b"a,\"b\n", "line 1: a quote"),
            (b"a,c\n", "column `b` is missing"),
            (b"a;b\n1;2\n", "between semicolons"),
            (b"a\tb\n1\t2\n", "between tabs"),
            (b"a,b\r1,2\r", "CR alone"),
            (b"a,b\r\n", "no rows"),
            (b"a,b", "no rows"),
        ] {
            let (read, ..) = read(content, b',');
            let error = read.unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
