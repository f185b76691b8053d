//! Lines of JSON: an object a line. A column is a key, or keys of objects inside each other with
//! dots between them.

use std::collections::BTreeSet;
use std::io::Read;

use serde_json::{Map, Value};

use super::Row;
use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::report::{ImportReport, RowError, RowFailure};
use crate::text::{Lines, unreadable};

/// The rows whose keys are a file's columns.
const HEAD_ROWS: usize = 1000;

/// A file to read.
pub(super) struct JsonFile<'a, R> {
    /// Its name in messages.
    pub(super) name: String,
    pub(super) content: R,
    pub(super) columns: &'a [String],
    /// The most rows that are read.
    pub(super) most_rows: u64,
}

/// The object of the line that was read last.
struct JsonRow<'a> {
    object: Map<String, Value>,
    columns: &'a [String],
}

impl Row for JsonRow<'_> {
    fn cell(&self, column: usize) -> Cell<'_> {
        find(&self.object, &self.columns[column]).map_or(Cell::Missing, cell)
    }
}

impl<R: Read> JsonFile<'_, R> {
    /// Calls `add` with every row, and counts those that it refuses.
    pub(super) fn read(
        self,
        report: &mut ImportReport,
        mut add: impl FnMut(&dyn Row) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        let mut seen = vec![false; self.columns.len()];
        let mut first = None;
        let JsonFile { name, content, columns, most_rows } = self;
        let lines = LineFile { name: name.clone(), content, most_rows };
        lines.read(report, |line| {
            let object = parse(line).map_err(RowError::of_line)?;
            for (seen, column) in seen.iter_mut().zip(columns) {
                *seen = *seen || find(&object, column).is_some();
            }
            first.get_or_insert_with(|| object.clone());
            add(&JsonRow { object, columns })
        })?;
        let missing = seen.iter().position(|seen| !seen);
        if let (Some(first), Some(at)) = (&first, missing) {
            let (missing, mut has) = (&columns[at], BTreeSet::new());
            add_columns(first, "", &mut has);
            let has = has.into_iter().collect::<Vec<String>>().join(", ");
            let reason = format!("column `{missing}` is in no row; the first row has {has}");
            return Err(Error::data(&name, reason));
        }
        report.close()
    }
}

/// A file of lines that are not empty.
pub(super) struct LineFile<R> {
    /// Its name in messages.
    pub(super) name: String,
    pub(super) content: R,
    /// The most lines that are read.
    pub(super) most_rows: u64,
}

impl<R: Read> LineFile<R> {
    /// Calls `add` with each line, and counts those that it refuses. The report of the file stays
    /// open.
    pub(super) fn read(
        self,
        report: &mut ImportReport,
        mut add: impl FnMut(&[u8]) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        let mut lines = Lines::new(self.content);
        report.open(&self.name);
        let mut rows = 0;
        for line in 1.. {
            let cut = |error: std::io::Error| Error::data(&self.name, unreadable(&error));
            let more = lines.next().map_err(cut)?;
            if !more || rows == self.most_rows {
                break;
            }
            if lines.line.trim_ascii().is_empty() {
                continue;
            }
            rows += 1;
            let whole = lines.whole().map_err(|reason| RowError::of_line(reason).into());
            let outcome = whole.and_then(&mut add);
            report.row(line, outcome)?;
        }
        if report.is_without_rows() {
            return Err(Error::data(&self.name, "it has no row; expected a JSON object a line"));
        }
        Ok(())
    }
}

/// The columns of the first rows, sorted.
pub(super) fn column_names(content: impl Read) -> std::result::Result<Vec<String>, String> {
    let mut lines = Lines::new(content);
    let mut names = BTreeSet::new();
    for _ in 0..HEAD_ROWS {
        if !lines.next().map_err(|error| unreadable(&error))? {
            break;
        }
        if let Ok(object) = lines.whole().and_then(parse) {
            add_columns(&object, "", &mut names);
        }
    }
    if names.is_empty() {
        return Err("it has no row; expected a JSON object a line".to_owned());
    }
    Ok(names.into_iter().collect())
}

fn parse(line: &[u8]) -> std::result::Result<Map<String, Value>, String> {
    if line.trim_ascii_start().starts_with(b"[") {
        let reason = "it is a JSON array; write an object a line, as `jq -c '.[]'` does";
        return Err(reason.to_owned());
    }
    serde_json::from_slice(line).map_err(|error| {
        let text = error.to_string();
        // The parser counts lines of its own, of which there is one.
        let reason = text.split(" at line ").next().unwrap_or(&text);
        format!("it is no JSON object: {reason} at byte {}", error.column())
    })
}

fn find<'a>(object: &'a Map<String, Value>, column: &str) -> Option<&'a Value> {
    object.get(column).or_else(|| {
        let (key, rest) = column.split_once('.')?;
        find(object.get(key)?.as_object()?, rest)
    })
}

fn add_columns(object: &Map<String, Value>, prefix: &str, names: &mut BTreeSet<String>) {
    for (key, value) in object {
        match value {
            Value::Object(inner) => add_columns(inner, &format!("{prefix}{key}."), names),
            _ => {
                names.insert(format!("{prefix}{key}"));
            }
        }
    }
}

fn cell(value: &Value) -> Cell<'_> {
    match value {
        Value::Null => Cell::Missing,
        Value::Bool(is_so) => Cell::Bool(*is_so),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Cell::Integer(number.into()),
            (_, Some(number)) => Cell::Integer(number.into()),
            _ => number.as_f64().map_or(Cell::Other("a number of no known form"), Cell::Number),
        },
        Value::String(text) => Cell::of_text(text.into()),
        Value::Array(list) => Cell::List(list.iter().map(cell).collect()),
        Value::Object(_) => Cell::Other("an object (its parts are columns with a dot, as `a.b`)"),
    }
}
