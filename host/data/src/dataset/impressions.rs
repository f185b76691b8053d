//! `impressions.parquet`: written and read one row group at a time, so that
//! memory does not grow with the data.

use std::path::Path;

use hypercast_fm::example::{MAX_VALUES, Outcome};

use super::table::{Column, Field, Kind, TableReader, TableWriter, Values};
use super::{Context, Impression};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{FeatureKind, Schema, names};

const ROWS_A_GROUP: usize = 1 << 15;

/// Columns before those of values, context features and truth.
const FIXED: [(&str, Kind); 9] = [
    ("request", Kind::U64),
    ("time_ms", Kind::I64),
    ("outcome_ms", Kind::I64),
    ("user", Kind::U64),
    ("item", Kind::U64),
    ("surface", Kind::U32),
    ("actions", Kind::U32),
    ("known", Kind::U32),
    ("history_only", Kind::Bool),
];

/// How many columns of each kind follow the fixed ones.
#[derive(Debug, Clone, Copy)]
struct Layout {
    values: usize,
    ids: usize,
    dense: usize,
    truth: usize,
}

/// Writes `impressions.parquet`. The rows must come sorted by time, a request's rows together.
pub struct ImpressionWriter {
    dir: std::path::PathBuf,
    schema: Schema,
    writer: Option<TableWriter>,
    layout: Layout,
    buffer: Vec<Impression>,
    last_ms: i64,
}

impl ImpressionWriter {
    /// Starts the file in `dir`.
    pub fn create(dir: &Path, schema: &Schema) -> Result<ImpressionWriter> {
        Ok(ImpressionWriter {
            dir: dir.to_path_buf(),
            schema: schema.clone(),
            writer: None,
            layout: layout(schema, false),
            buffer: Vec::with_capacity(ROWS_A_GROUP),
            last_ms: i64::MIN,
        })
    }

    /// Adds one impression. Rows out of time order are a programmer's error.
    pub fn write(&mut self, impression: &Impression) -> Result<()> {
        assert!(impression.time_ms >= self.last_ms, "impressions are sorted by time");
        self.last_ms = impression.time_ms;
        self.buffer.push(impression.clone());
        if self.buffer.len() == ROWS_A_GROUP { self.flush() } else { Ok(()) }
    }

    /// Writes what is left and gives the file its name.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.writer.take().expect("opened by flush").finish()
    }

    fn flush(&mut self) -> Result<()> {
        // The first rows tell whether the world is simulated, that is, whether truth has columns.
        if self.writer.is_none() {
            let simulated = self.buffer.iter().any(|row| !row.truth.is_empty());
            self.layout = layout(&self.schema, simulated);
            let path = self.dir.join("impressions.parquet");
            self.writer = Some(TableWriter::create(&path, fields(&self.schema, simulated))?);
        }
        if !self.buffer.is_empty() {
            let columns = columns(&self.buffer, self.layout);
            self.writer.as_mut().expect("opened above").write(&columns)?;
            self.buffer.clear();
        }
        Ok(())
    }
}

/// Streams `impressions.parquet` in time order.
pub struct ImpressionReader {
    reader: TableReader,
    path: std::path::PathBuf,
    surfaces: usize,
    fields: Vec<Field>,
    layout: Layout,
    next_group: usize,
    columns: Vec<Column>,
    row: usize,
}

impl ImpressionReader {
    /// Opens the file in `dir`.
    pub fn open(dir: &Path, schema: &Schema) -> Result<ImpressionReader> {
        let path = dir.join("impressions.parquet");
        let reader = TableReader::open(&path)?;
        let simulated =
            schema.tasks.first().is_some_and(|task| reader.has(&format!("truth_{}", task.name)));
        Ok(ImpressionReader {
            fields: fields(schema, simulated),
            layout: layout(schema, simulated),
            surfaces: schema.surfaces.len(),
            reader,
            path,
            next_group: 0,
            columns: Vec::new(),
            row: 0,
        })
    }

    /// The number of impressions in the file.
    pub fn rows(&self) -> usize {
        self.reader.rows()
    }

    fn fill(&mut self) -> Result<bool> {
        while self.columns.first().is_none_or(|column| self.row == column.u64s().len()) {
            if self.next_group == self.reader.groups() {
                return Ok(false);
            }
            self.columns = self.reader.read(self.next_group, &self.fields)?;
            self.next_group += 1;
            self.row = 0;
            if self.columns[5].u32s().iter().any(|&surface| surface as usize >= self.surfaces) {
                return Err(Error::data(
                    &self.path,
                    "column `surface` has an index beyond the schema's surfaces",
                ));
            }
        }
        Ok(true)
    }
}

impl Iterator for ImpressionReader {
    type Item = Result<Impression>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.fill() {
            Ok(false) => None,
            Err(error) => Some(Err(error)),
            Ok(true) => {
                self.row += 1;
                Some(Ok(impression(&self.columns, self.layout, self.row - 1)))
            }
        }
    }
}

fn layout(schema: &Schema, simulated: bool) -> Layout {
    Layout {
        values: schema.values.len(),
        ids: names(&schema.context_features, FeatureKind::Categorical).len(),
        dense: names(&schema.context_features, FeatureKind::Dense).len(),
        truth: if simulated { schema.tasks.len() } else { 0 },
    }
}

fn fields(schema: &Schema, simulated: bool) -> Vec<Field> {
    let context = |kind| names(&schema.context_features, kind).into_iter();
    let truths = schema.tasks.iter().take(if simulated { schema.tasks.len() } else { 0 });
    let mut fields: Vec<Field> = FIXED.iter().map(|&(name, kind)| Field::new(name, kind)).collect();
    fields.extend(schema.values.iter().map(|name| Field::new(format!("value_{name}"), Kind::F32)));
    fields.extend(context(FeatureKind::Categorical).map(|name| Field::new(name, Kind::U64)));
    fields.extend(context(FeatureKind::Dense).map(|name| Field::new(name, Kind::F32)));
    fields.extend(truths.map(|task| Field::new(format!("truth_{}", task.name), Kind::F32)));
    fields
}

fn columns(rows: &[Impression], layout: Layout) -> Vec<Column> {
    let u64s = |get: &dyn Fn(&Impression) -> u64| {
        Column::scalars(Values::U64(rows.iter().map(get).collect()))
    };
    let i64s = |get: &dyn Fn(&Impression) -> i64| {
        Column::scalars(Values::I64(rows.iter().map(get).collect()))
    };
    let u32s = |get: &dyn Fn(&Impression) -> u32| {
        Column::scalars(Values::U32(rows.iter().map(get).collect()))
    };
    let f32s = |get: &dyn Fn(&Impression) -> f32| {
        Column::scalars(Values::F32(rows.iter().map(get).collect()))
    };
    let mut columns = vec![
        u64s(&|row| row.request),
        i64s(&|row| row.time_ms),
        i64s(&|row| row.outcome_ms),
        u64s(&|row| row.user),
        u64s(&|row| row.item),
        u32s(&|row| u32::from(row.surface)),
        u32s(&|row| row.outcome.actions),
        u32s(&|row| row.outcome.known),
        Column::scalars(Values::Bool(rows.iter().map(|row| row.history_only).collect())),
    ];
    columns.extend((0..layout.values).map(|i| f32s(&|row| row.outcome.values[i])));
    columns
        .extend((0..layout.ids).map(|i| u64s(&|row| row.context.ids.get(i).copied().unwrap_or(0))));
    columns.extend(
        (0..layout.dense).map(|i| f32s(&|row| row.context.dense.get(i).copied().unwrap_or(0.0))),
    );
    columns.extend(
        (0..layout.truth).map(|i| f32s(&|row| row.truth.get(i).copied().unwrap_or(f32::NAN))),
    );
    columns
}

fn impression(columns: &[Column], layout: Layout, row: usize) -> Impression {
    let (fixed, rest) = columns.split_at(FIXED.len());
    let (value_columns, rest) = rest.split_at(layout.values);
    let (id_columns, rest) = rest.split_at(layout.ids);
    let (dense_columns, truth_columns) = rest.split_at(layout.dense);
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
        // `fill` checked it against the number of surfaces, which fits 16 bits.
        surface: fixed[5].u32s()[row] as u16,
        outcome: Outcome { actions: fixed[6].u32s()[row], known: fixed[7].u32s()[row], values },
        context: Context {
            ids: id_columns.iter().map(|column| column.u64s()[row]).collect(),
            dense: floats(dense_columns),
        },
        truth: floats(truth_columns),
        history_only: fixed[8].bools()[row],
    }
}
