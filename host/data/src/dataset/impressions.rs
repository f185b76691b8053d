//! `impressions.parquet`: written and read one row group at a time, so that memory does not grow
//! with the data.

use std::path::{Path, PathBuf};

use hypercast_fm::example::{MAX_VALUES, Outcome};

use super::table::{CellType, Column, Field, TableReader, TableWriter};
use super::{ContextFeatures, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{FeatureCounts, FeatureKind, Schema, names};

const ROWS_PER_GROUP: usize = 1 << 15;

/// Columns before those of values, context features and truth.
const FIXED: [(&str, CellType); 9] = [
    ("request", CellType::U64),
    ("time_ms", CellType::I64),
    ("outcome_ms", CellType::I64),
    ("user", CellType::U64),
    ("item", CellType::U64),
    ("surface", CellType::U32),
    ("actions", CellType::U32),
    ("known", CellType::U32),
    ("history_only", CellType::Bool),
];

/// Indices among the fixed columns.
const SURFACE: usize = 5;
const HISTORY_ONLY: usize = 8;

/// How many columns of each kind follow the fixed ones.
#[derive(Debug, Clone, Copy)]
struct ColumnCounts {
    values: usize,
    context: FeatureCounts,
    truth: usize,
}

impl ColumnCounts {
    fn new(schema: &Schema, simulated: bool) -> ColumnCounts {
        ColumnCounts {
            values: schema.values.len(),
            context: FeatureCounts::of(&schema.context_features),
            truth: if simulated { schema.tasks.len() } else { 0 },
        }
    }
}

/// Writes `impressions.parquet`. The rows must be sorted by time, with a request's rows together.
pub struct ImpressionWriter {
    path: PathBuf,
    schema: Schema,
    /// Open from the first row group on, which decides whether truth has columns.
    writer: Option<(TableWriter, ColumnCounts)>,
    buffer: Vec<Impression>,
    last_ms: i64,
}

impl ImpressionWriter {
    /// Starts the file in `dir`.
    pub fn create(dir: &Path, schema: &Schema) -> ImpressionWriter {
        ImpressionWriter {
            path: dir.join("impressions.parquet"),
            schema: schema.clone(),
            writer: None,
            buffer: Vec::with_capacity(ROWS_PER_GROUP),
            last_ms: i64::MIN,
        }
    }

    /// Adds one impression.
    ///
    /// # Panics
    /// The impression is earlier than the one before it.
    pub fn write(&mut self, impression: &Impression) -> Result<()> {
        assert!(impression.time_ms >= self.last_ms, "impressions are sorted by time");
        self.last_ms = impression.time_ms;
        self.write_in_any_order(impression)
    }

    /// Adds one impression wherever it stands in time. Only tests of readers want that.
    pub(crate) fn write_in_any_order(&mut self, impression: &Impression) -> Result<()> {
        self.buffer.push(impression.clone());
        if self.buffer.len() == ROWS_PER_GROUP { self.flush() } else { Ok(()) }
    }

    /// Writes the rest and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.writer.take().expect("opened by flush").0.finish()
    }

    fn flush(&mut self) -> Result<()> {
        if self.writer.is_none() {
            let simulated = self.buffer.iter().any(|row| !row.truth.is_empty());
            let writer = TableWriter::create(&self.path, fields(&self.schema, simulated))?;
            self.writer = Some((writer, ColumnCounts::new(&self.schema, simulated)));
        }
        let (writer, counts) = self.writer.as_mut().expect("opened above");
        if !self.buffer.is_empty() {
            writer.write(&columns(&self.buffer, *counts))?;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Streams `impressions.parquet` in time order. A row that is earlier than the one before it is an
/// error: whoever went on would learn from the future, and look the better for it.
pub struct ImpressionReader {
    reader: TableReader,
    path: PathBuf,
    surfaces: usize,
    fields: Vec<Field>,
    counts: ColumnCounts,
    next_group: usize,
    /// The rest of the row group before that.
    ready: std::vec::IntoIter<Impression>,
    /// Rows that were handed out.
    row: u64,
    last_ms: i64,
    must_be_sorted: bool,
}

impl ImpressionReader {
    /// Opens the file in `dir`.
    pub fn open(dir: &Path, schema: &Schema) -> Result<ImpressionReader> {
        let path = dir.join("impressions.parquet");
        let reader = TableReader::open(&path)?;
        let has_truth = |name: &str| reader.has(&format!("truth_{name}"));
        let simulated = schema.tasks.first().is_some_and(|task| has_truth(&task.name));
        Ok(ImpressionReader {
            fields: fields(schema, simulated),
            counts: ColumnCounts::new(schema, simulated),
            surfaces: schema.surfaces.len(),
            reader,
            path,
            next_group: 0,
            ready: Vec::new().into_iter(),
            row: 0,
            last_ms: i64::MIN,
            must_be_sorted: true,
        })
    }

    /// The rows in whatever order the file has them: for [`crate::check`], which counts those that
    /// are out of order.
    pub(crate) fn in_any_order(self) -> ImpressionReader {
        ImpressionReader { must_be_sorted: false, ..self }
    }

    /// The number of rows that are not mere history.
    ///
    /// # Errors
    /// The column cannot be read.
    pub(crate) fn shown_rows(&self) -> Result<u64> {
        let mut shown = 0;
        for group in 0..self.reader.groups() {
            let columns = self.reader.read(group, &self.fields[HISTORY_ONLY..=HISTORY_ONLY])?;
            shown += columns[0].bools().iter().filter(|&&history_only| !history_only).count();
        }
        Ok(shown as u64)
    }

    /// The number of impressions in the file.
    pub fn rows(&self) -> usize {
        self.reader.rows()
    }

    fn next_impression(&mut self) -> Result<Option<Impression>> {
        loop {
            if let Some(impression) = self.ready.next() {
                self.row += 1;
                self.check_order(impression.time_ms)?;
                return Ok(Some(impression));
            }
            if self.next_group == self.reader.groups() {
                return Ok(None);
            }
            let columns = self.reader.read(self.next_group, &self.fields)?;
            self.next_group += 1;
            let surfaces = columns[SURFACE].u32s();
            let beyond = surfaces.iter().position(|&surface| surface as usize >= self.surfaces);
            if let Some(at) = beyond {
                let row = self.row + at as u64 + 1;
                let reason = format!(
                    "row {row}: column `surface` is {}, beyond the schema's {} surfaces, which \
                     count from 0",
                    surfaces[at], self.surfaces
                );
                return Err(Error::data(&self.path, reason));
            }
            let rows = 0..surfaces.len();
            let impressions = rows.map(|row| impression(&columns, self.counts, row));
            self.ready = impressions.collect::<Vec<Impression>>().into_iter();
        }
    }

    fn check_order(&mut self, time_ms: i64) -> Result<()> {
        if time_ms < self.last_ms && self.must_be_sorted {
            let reason = format!(
                "row {}: its `time_ms` {time_ms} is before {}, that of the row before it; sort the \
                 rows by time, those of a request together, as every `hypercast data import` does",
                self.row, self.last_ms
            );
            return Err(Error::data(&self.path, reason));
        }
        self.last_ms = time_ms;
        Ok(())
    }
}

impl Iterator for ImpressionReader {
    type Item = Result<Impression>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_impression().transpose()
    }
}

fn fields(schema: &Schema, simulated: bool) -> Vec<Field> {
    let context = |kind| names(&schema.context_features, kind).into_iter();
    let truths = schema.tasks.iter().filter(|_| simulated);
    let mut fields: Vec<Field> = FIXED.iter().map(|&(name, kind)| Field::new(name, kind)).collect();
    let value = |name: &String| Field::new(format!("value_{name}"), CellType::F32);
    fields.extend(schema.values.iter().map(value));
    fields.extend(context(FeatureKind::Categorical).map(|name| Field::new(name, CellType::U64)));
    fields.extend(context(FeatureKind::Dense).map(|name| Field::new(name, CellType::F32)));
    fields.extend(truths.map(|task| Field::new(format!("truth_{}", task.name), CellType::F32)));
    fields
}

fn columns(rows: &[Impression], counts: ColumnCounts) -> Vec<Column> {
    /// A column of one value per row.
    fn of<T>(rows: &[Impression], value: impl Fn(&Impression) -> T) -> Column
    where
        super::table::ColumnValues: FromIterator<T>,
    {
        Column::scalars(rows.iter().map(value))
    }
    let mut columns = vec![
        of(rows, |row| row.request),
        of(rows, |row| row.time_ms),
        of(rows, |row| row.outcome_ms),
        of(rows, |row| row.user),
        of(rows, |row| row.item),
        of(rows, |row| u32::from(row.surface)),
        of(rows, |row| row.outcome.actions),
        of(rows, |row| row.outcome.known),
        of(rows, |row| row.history_only),
    ];
    let context = |row: &Impression, i: usize| row.context.dense.get(i).copied().unwrap_or(0.0);
    let truth = |row: &Impression, i: usize| row.truth.get(i).copied().unwrap_or(f32::NAN);
    columns.extend((0..counts.values).map(|i| of(rows, |row| row.outcome.values[i])));
    columns.extend(
        (0..counts.context.ids)
            .map(|i| of(rows, |row| row.context.ids.get(i).copied().unwrap_or(0))),
    );
    columns.extend((0..counts.context.dense).map(|i| of(rows, |row| context(row, i))));
    columns.extend((0..counts.truth).map(|i| of(rows, |row| truth(row, i))));
    columns
}

fn impression(columns: &[Column], counts: ColumnCounts, row: usize) -> Impression {
    let (fixed, rest) = columns.split_at(FIXED.len());
    let (value_columns, rest) = rest.split_at(counts.values);
    let (id_columns, rest) = rest.split_at(counts.context.ids);
    let (dense_columns, truth_columns) = rest.split_at(counts.context.dense);
    let mut values = [f32::NAN; MAX_VALUES];
    for (value, column) in values.iter_mut().zip(value_columns) {
        *value = column.f32s()[row];
    }
    let floats = |columns: &[Column]| columns.iter().map(|column| column.f32s()[row]).collect();
    Impression {
        request: fixed[0].u64s()[row],
        time_ms: fixed[1].i64s()[row],
        outcome_ms: fixed[2].i64s()[row],
        user: fixed[3].u64s()[row],
        item: fixed[4].u64s()[row],
        // The reader checked it against the number of surfaces, which fits 16 bits.
        surface: fixed[5].u32s()[row] as u16,
        outcome: Outcome { actions: fixed[6].u32s()[row], known: fixed[7].u32s()[row], values },
        context: ContextFeatures {
            ids: id_columns.iter().map(|column| column.u64s()[row]).collect(),
            dense: floats(dense_columns),
        },
        truth: floats(truth_columns),
        history_only: fixed[8].bools()[row],
    }
}
