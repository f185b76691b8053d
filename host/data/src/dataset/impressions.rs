//! `impressions.parquet`: written and read one row group at a time, so that memory does not grow
//! with the data.

use std::ops::Range;
use std::path::{Path, PathBuf};

use hypercast_fm::example::{MAX_VALUES, Outcome};

use super::table::{CellType, Column, Field, TableReader, TableWriter};
use super::{ContextFeatures, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{ColumnDefaults, FeatureCounts, FeatureKind, MISSING, Schema, columns_of};

const ROWS_PER_GROUP: usize = 1 << 15;

/// Columns before those of values, context features and truth.
const FIXED: [(&str, CellType); 9] = [
    ("request", CellType::U64),
    ("time_ms", CellType::I64),
    ("outcome_ms", CellType::I64),
    ("user", CellType::U64),
    ("item", CellType::U64),
    ("surface", CellType::U32),
    ("actions", CellType::U64),
    ("known", CellType::U64),
    ("history_only", CellType::Bool),
];

/// Indices among the fixed columns.
const SURFACE: usize = 5;
const MASKS: Range<usize> = 6..8;
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
    writer: Option<TableWriter>,
    buffer: ImpressionColumns,
    last_ms: i64,
}

impl ImpressionWriter {
    /// Starts the file in `dir`.
    pub fn create(dir: &Path, schema: &Schema) -> ImpressionWriter {
        ImpressionWriter {
            path: dir.join("impressions.parquet"),
            schema: schema.clone(),
            writer: None,
            buffer: ImpressionColumns::new(ColumnCounts::new(schema, true)),
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
        self.buffer.push(impression);
        if self.buffer.request.len() == ROWS_PER_GROUP { self.flush() } else { Ok(()) }
    }

    /// Writes the rest and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.writer.take().expect("opened by flush").finish()
    }

    fn flush(&mut self) -> Result<()> {
        let writer = match &mut self.writer {
            Some(writer) => writer,
            None => {
                if !self.buffer.is_simulated {
                    self.buffer.truth.clear();
                }
                let fields = fields(&self.schema, self.buffer.is_simulated);
                self.writer.insert(TableWriter::create(&self.path, fields)?)
            }
        };
        if !self.buffer.request.is_empty() {
            writer.write(&self.buffer.take())?;
        }
        Ok(())
    }
}

/// The rows of the next row group.
struct ImpressionColumns {
    request: Vec<u64>,
    time_ms: Vec<i64>,
    outcome_ms: Vec<i64>,
    user: Vec<u64>,
    item: Vec<u64>,
    surface: Vec<u32>,
    actions: Vec<u64>,
    known: Vec<u64>,
    history_only: Vec<bool>,
    values: Vec<Vec<f32>>,
    ids: Vec<Vec<u64>>,
    dense: Vec<Vec<f32>>,
    truth: Vec<Vec<f32>>,
    /// Whether a row has had a truth.
    is_simulated: bool,
}

/// Puts a cell of a row into each column; `missing` where the row has none.
fn push_all<T: Copy>(columns: &mut [Vec<T>], cells: &[T], missing: T) {
    for (at, column) in columns.iter_mut().enumerate() {
        column.push(cells.get(at).copied().unwrap_or(missing));
    }
}

/// What a column holds; the column goes on with room for as many cells.
fn take<T>(column: &mut Vec<T>) -> Column
where
    super::table::ColumnValues: FromIterator<T>,
{
    let room = Vec::with_capacity(column.len());
    Column::scalars(std::mem::replace(column, room))
}

impl ImpressionColumns {
    fn new(counts: ColumnCounts) -> ImpressionColumns {
        let ColumnCounts { values, context: FeatureCounts { ids, dense }, truth } = counts;
        ImpressionColumns {
            request: Vec::new(),
            time_ms: Vec::new(),
            outcome_ms: Vec::new(),
            user: Vec::new(),
            item: Vec::new(),
            surface: Vec::new(),
            actions: Vec::new(),
            known: Vec::new(),
            history_only: Vec::new(),
            values: vec![Vec::new(); values],
            ids: vec![Vec::new(); ids],
            dense: vec![Vec::new(); dense],
            truth: vec![Vec::new(); truth],
            is_simulated: false,
        }
    }

    fn push(&mut self, row: &Impression) {
        self.request.push(row.request);
        self.time_ms.push(row.time_ms);
        self.outcome_ms.push(row.outcome_ms);
        self.user.push(row.user);
        self.item.push(row.item);
        self.surface.push(row.surface.into());
        self.actions.push(row.outcome.actions);
        self.known.push(row.outcome.known);
        self.history_only.push(row.history_only);
        push_all(&mut self.values, &row.outcome.values, f32::NAN);
        push_all(&mut self.ids, &row.context.ids, 0);
        push_all(&mut self.dense, &row.context.dense, MISSING);
        push_all(&mut self.truth, &row.truth, f32::NAN);
        self.is_simulated |= !row.truth.is_empty();
    }

    /// The columns in the order of [`fields`]; none has a row behind this.
    fn take(&mut self) -> Vec<Column> {
        let mut columns = vec![
            take(&mut self.request),
            take(&mut self.time_ms),
            take(&mut self.outcome_ms),
            take(&mut self.user),
            take(&mut self.item),
            take(&mut self.surface),
            take(&mut self.actions),
            take(&mut self.known),
            take(&mut self.history_only),
        ];
        columns.extend(self.values.iter_mut().map(take));
        columns.extend(self.ids.iter_mut().map(take));
        columns.extend(self.dense.iter_mut().map(take));
        columns.extend(self.truth.iter_mut().map(take));
        columns
    }
}

/// Streams `impressions.parquet` in time order. A row that is earlier than the one before it is an
/// error: whoever went on would learn from the future, and look the better for it.
pub struct ImpressionReader {
    reader: TableReader,
    path: PathBuf,
    surfaces: usize,
    fields: Vec<Field>,
    defaults: ColumnDefaults,
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
            defaults: ColumnDefaults::new(schema),
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
            let columns = self.reader.read_grown(self.next_group, &self.fields, &self.defaults)?;
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
    let context = |kind| columns_of(&schema.context_features, kind).into_iter();
    let truths = schema.tasks.iter().filter(|_| simulated);
    let fixed = FIXED.iter().enumerate().map(|(at, &(name, kind))| {
        let field = Field::new(name, kind);
        if MASKS.contains(&at) { field.of_masks(schema.actions.len()) } else { field }
    });
    let mut fields: Vec<Field> = fixed.collect();
    let value = |name: &String| Field::new(format!("value_{name}"), CellType::F32);
    fields.extend(schema.values.iter().map(value));
    fields.extend(context(FeatureKind::Categorical).map(Field::category));
    fields.extend(context(FeatureKind::Dense).map(|name| Field::new(name, CellType::F32)));
    fields.extend(truths.map(|task| Field::new(format!("truth_{}", task.name), CellType::F32)));
    fields
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
        outcome: Outcome { actions: fixed[6].u64s()[row], known: fixed[7].u64s()[row], values },
        context: ContextFeatures {
            ids: id_columns.iter().map(|column| column.u64s()[row]).collect(),
            dense: floats(dense_columns),
        },
        truth: floats(truth_columns),
        history_only: fixed[8].bools()[row],
    }
}
