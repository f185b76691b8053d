//! Parquet of any writer, by the columns that are wanted, a batch of rows at a time.
//!
//! A column is a leaf: the fields of a structure have its name and a dot before theirs. Numbers of
//! any width, decimals, dates, timestamps, texts and lists of these are read, with nulls, whatever
//! they are compressed with but Brotli and LZO.

use std::fs::File;
use std::ops::Range;
use std::path::Path;

use hypercast_core::hex::hex;
use parquet::basic::{ConvertedType, LogicalType, TimeUnit, Type};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType, FixedLenByteArray, Int96};
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::{Reading, Row};
use crate::cell::Cell;
use crate::error::{CommonErrors as _, Error, Result};
use crate::prefetch::{ItemSender, Prefetch};
use crate::report::RowFailure;

/// The rows that are decoded together, and how many such batches wait.
const BATCH_ROWS: usize = 2048;
const BATCHES_AHEAD: usize = 8;

/// Names that writers give to what is between a list and its elements.
const LIST_PARTS: [&str; 7] =
    ["list", "element", "item", "array", "bag", "array_element", "key_value"];

/// The names of a file's columns.
pub(super) fn column_names(path: &Path) -> Result<Vec<String>> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    Ok(schema.columns().iter().map(|column| name_of(column)).collect())
}

/// Calls `add` with each row.
pub(super) fn read(
    path: &Path,
    reading: &mut Reading<'_>,
    mut add: impl FnMut(&dyn Row) -> std::result::Result<(), RowFailure>,
) -> Result<()> {
    let reader = open(path)?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<String> = schema.columns().iter().map(|column| name_of(column)).collect();
    let wanted = reading.columns.iter().map(|column| {
        names.iter().position(|name| name == column).ok_or_else(|| {
            let has = names.join(", ");
            Error::data(path, format!("column `{column}` is missing; the file has {has}"))
        })
    });
    let wanted = wanted.collect::<Result<Vec<usize>>>()?;
    reading.report.open(&path.display().to_string());
    let (file, most_rows) = (path.to_path_buf(), reading.most_rows);
    let mut batches = Prefetch::start("parquet", BATCHES_AHEAD, move |to| {
        send_batches(&reader, &wanted, most_rows, to).map_err(failed(&file))
    })?;
    let mut line = 0;
    while let Some(batch) = batches.next()? {
        for row in 0..batch.rows {
            line += 1;
            let outcome = add(&ParquetRow { columns: &batch.columns, row });
            reading.report.row(line, outcome)?;
        }
        reading.progress.advance(batch.bytes, || path.display().to_string());
    }
    if line == 0 {
        return Err(Error::data(path, "it has no row"));
    }
    reading.report.close()
}

/// Rows of a row group.
struct RowBatch {
    columns: Vec<ColumnBatch>,
    rows: usize,
    /// The bytes of the row group, with its last batch.
    bytes: u64,
}

/// Reads the columns at the places `wanted`, until nobody takes their batches.
fn send_batches(
    reader: &SerializedFileReader<File>,
    wanted: &[usize],
    most_rows: u64,
    to: &ItemSender<RowBatch>,
) -> parquet::errors::Result<()> {
    let mut most = usize::try_from(most_rows).unwrap_or(usize::MAX);
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        let decoders = wanted.iter().map(|&at| ColumnDecoder::open(&*group, at));
        let mut decoders = decoders.collect::<parquet::errors::Result<Vec<ColumnDecoder>>>()?;
        let mut left = usize::try_from(group.metadata().num_rows()).unwrap_or_default();
        let group_bytes = u64::try_from(group.metadata().compressed_size()).unwrap_or_default();
        while left > 0 && most > 0 {
            let rows = left.min(BATCH_ROWS).min(most);
            let columns = decoders.iter_mut().map(|decoder| decoder.read(rows));
            let columns = columns.collect::<parquet::errors::Result<Vec<ColumnBatch>>>()?;
            (left, most) = (left - rows, most - rows);
            let bytes = if left == 0 { group_bytes } else { 0 };
            if !to.send(RowBatch { columns, rows, bytes }) {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn open(path: &Path) -> Result<SerializedFileReader<File>> {
    let file = File::open(path).map_err(Error::io(path))?;
    SerializedFileReader::new(file).map_err(failed(path))
}

fn failed(path: &Path) -> impl Fn(ParquetError) -> Error {
    move |error| {
        let reason = match error.to_string() {
            text if text.contains("BROTLI") || text.contains("LZO") => {
                format!("{text}; write it with zstd, snappy, lz4, gzip or without compression")
            }
            text => format!("{text}; is it a complete Parquet file?"),
        };
        Error::data(path, reason)
    }
}

fn name_of(column: &ColumnDescriptor) -> String {
    let parts = column.path().parts().iter().enumerate();
    let is_list = column.max_rep_level() > 0;
    let told =
        parts.filter(|(at, part)| *at == 0 || !(is_list && LIST_PARTS.contains(&part.as_str())));
    told.map(|(_, part)| part.as_str()).collect::<Vec<_>>().join(".")
}

/// A row of the batch that the columns hold.
struct ParquetRow<'a> {
    columns: &'a [ColumnBatch],
    row: usize,
}

impl Row for ParquetRow<'_> {
    fn cell(&self, column: usize) -> Cell<'_> {
        self.columns[column].cell(self.row)
    }
}

/// A column of a row group.
struct ColumnDecoder {
    reader: ColumnReader,
    meaning: Meaning,
    max_definition: i16,
    max_repetition: i16,
}

/// Rows of a column.
struct ColumnBatch {
    meaning: Meaning,
    is_list: bool,
    values: Values,
    /// The indices of each row's value or elements: none for a null. Without it, each row has a
    /// value.
    places: Option<Vec<Range<u32>>>,
}

/// The values of a batch without nulls, as the file has them.
enum Values {
    Bool(Vec<bool>),
    Int32(Vec<i32>),
    Int64(Vec<i64>),
    Int96(Vec<Int96>),
    Float(Vec<f32>),
    Double(Vec<f64>),
    Bytes(Vec<ByteArray>),
    Fixed(Vec<FixedLenByteArray>),
}

/// What the values of a column stand for.
#[derive(Debug, Clone, Copy)]
enum Meaning {
    /// What their type says: a number, or a text in UTF-8.
    Plain,
    /// Bits of an unsigned integer.
    Unsigned,
    /// An integer over 10 to the power of this.
    Decimal(i32),
    /// Days since 1970.
    Days,
    /// Timestamps, by the number of their units in a second.
    Timestamp(i64),
    /// Floats of 16 bits.
    Float16,
    /// The sixteen bytes of a UUID.
    Uuid,
    /// Nothing that a cell can be, in words.
    Other(&'static str),
}

impl Meaning {
    fn of(column: &ColumnDescriptor) -> Meaning {
        if column.max_rep_level() > 1 {
            return Meaning::Other("a list of lists");
        }
        match (column.logical_type_ref(), column.converted_type()) {
            (Some(LogicalType::Timestamp { unit, .. }), _) => Meaning::Timestamp(match unit {
                TimeUnit::MILLIS => 1_000,
                TimeUnit::MICROS => 1_000_000,
                TimeUnit::NANOS => 1_000_000_000,
            }),
            (_, ConvertedType::TIMESTAMP_MILLIS) => Meaning::Timestamp(1_000),
            (_, ConvertedType::TIMESTAMP_MICROS) => Meaning::Timestamp(1_000_000),
            (Some(LogicalType::Date), _) | (_, ConvertedType::DATE) => Meaning::Days,
            (Some(LogicalType::Decimal { .. }), _) | (_, ConvertedType::DECIMAL) => {
                Meaning::Decimal(column.type_scale())
            }
            (Some(LogicalType::Integer { is_signed: false, .. }), _)
            | (
                _,
                ConvertedType::UINT_8
                | ConvertedType::UINT_16
                | ConvertedType::UINT_32
                | ConvertedType::UINT_64,
            ) => Meaning::Unsigned,
            (Some(LogicalType::Float16), _) => Meaning::Float16,
            (Some(LogicalType::Uuid), _) => Meaning::Uuid,
            (Some(LogicalType::Time { .. }), _) => Meaning::Other("a time of day"),
            _ if column.physical_type() == Type::FIXED_LEN_BYTE_ARRAY => Meaning::Other("bytes"),
            _ => Meaning::Plain,
        }
    }
}

impl ColumnDecoder {
    fn open(group: &dyn RowGroupReader, at: usize) -> parquet::errors::Result<ColumnDecoder> {
        let descriptor = group.metadata().column(at).column_descr();
        Ok(ColumnDecoder {
            reader: group.get_column_reader(at)?,
            meaning: Meaning::of(descriptor),
            max_definition: descriptor.max_def_level(),
            max_repetition: descriptor.max_rep_level(),
        })
    }

    /// Reads the next batch, of that many rows.
    fn read(&mut self, rows: usize) -> parquet::errors::Result<ColumnBatch> {
        let (levels, values) = match &mut self.reader {
            ColumnReader::BoolColumnReader(reader) => read_rows(reader, rows, Values::Bool),
            ColumnReader::Int32ColumnReader(reader) => read_rows(reader, rows, Values::Int32),
            ColumnReader::Int64ColumnReader(reader) => read_rows(reader, rows, Values::Int64),
            ColumnReader::Int96ColumnReader(reader) => read_rows(reader, rows, Values::Int96),
            ColumnReader::FloatColumnReader(reader) => read_rows(reader, rows, Values::Float),
            ColumnReader::DoubleColumnReader(reader) => read_rows(reader, rows, Values::Double),
            ColumnReader::ByteArrayColumnReader(reader) => read_rows(reader, rows, Values::Bytes),
            ColumnReader::FixedLenByteArrayColumnReader(reader) => {
                read_rows(reader, rows, Values::Fixed)
            }
        }?;
        let is_list = self.max_repetition == 1;
        let is_whole = self.max_repetition == 0 && levels.values == rows;
        let places = if is_whole { None } else { Some(self.places(&levels)) };
        match places.as_ref().map_or(rows, Vec::len) {
            found if found == rows => {
                Ok(ColumnBatch { meaning: self.meaning, is_list, values, places })
            }
            found => Err(ParquetError::General(format!(
                "{found} rows of a column, its row group has {rows}"
            ))),
        }
    }

    fn places(&self, levels: &Levels) -> Vec<Range<u32>> {
        let (mut places, mut next) = (Vec::new(), 0);
        for at in 0..levels.count {
            let is_first = self.max_repetition == 0 || levels.repetition[at] == 0;
            if is_first {
                places.push(next..next);
            }
            if self.max_definition == 0 || levels.definition[at] == self.max_definition {
                next += 1;
                places.last_mut().expect("a row's first level is 0").end = next;
            }
        }
        places
    }
}

impl ColumnBatch {
    fn cell(&self, row: usize) -> Cell<'_> {
        let mut values = match &self.places {
            None => row..row + 1,
            Some(places) => places[row].start as usize..places[row].end as usize,
        };
        let cell = |at| match self.meaning {
            Meaning::Other(what) => Cell::Other(what),
            _ => self.value(at),
        };
        if self.is_list {
            return Cell::List(values.map(cell).collect());
        }
        values.next().map_or(Cell::Missing, cell)
    }

    fn value(&self, at: usize) -> Cell<'_> {
        match &self.values {
            Values::Bool(values) => Cell::Bool(values[at]),
            Values::Float(values) => Cell::Float(values[at]),
            Values::Double(values) => Cell::Number(values[at]),
            Values::Int96(values) => Cell::TimeMs(values[at].to_millis()),
            Values::Int32(values) => match self.meaning {
                Meaning::Unsigned => Cell::Integer((values[at] as u32).into()),
                _ => self.integer(values[at].into()),
            },
            Values::Int64(values) => match self.meaning {
                Meaning::Unsigned => Cell::Integer((values[at] as u64).into()),
                _ => self.integer(values[at]),
            },
            Values::Bytes(values) => match self.meaning {
                Meaning::Decimal(scale) => decimal(big_endian(values[at].data()), scale),
                _ => std::str::from_utf8(values[at].data())
                    .map_or(Cell::Other("bytes"), |text| Cell::of_text(text.into())),
            },
            Values::Fixed(values) => match (self.meaning, values[at].data()) {
                (Meaning::Decimal(scale), bytes) => decimal(big_endian(bytes), scale),
                (Meaning::Float16, &[low, high]) => {
                    Cell::Number(half::f16::from_le_bytes([low, high]).into())
                }
                (Meaning::Uuid, bytes) => Cell::Text(uuid(bytes).into()),
                _ => Cell::Other("bytes"),
            },
        }
    }

    fn integer(&self, value: i64) -> Cell<'_> {
        match self.meaning {
            Meaning::Decimal(scale) => decimal(value.into(), scale),
            Meaning::Days => Cell::TimeMs(value.saturating_mul(86_400_000)),
            Meaning::Timestamp(a_second) => Cell::TimeMs(value.div_euclid(a_second / 1_000)),
            _ => Cell::Integer(value.into()),
        }
    }
}

/// Which rows of a batch have values, as Dremel levels.
struct Levels {
    count: usize,
    /// The number of values.
    values: usize,
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

/// Reads rows of a column.
fn read_rows<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    rows: usize,
    values_of: fn(Vec<T::T>) -> Values,
) -> parquet::errors::Result<(Levels, Values)> {
    let mut values = Vec::with_capacity(rows);
    let (mut definition, mut repetition) = (Vec::new(), Vec::new());
    let (mut count, mut left) = (0, rows);
    while left > 0 {
        let (read, _, levels) =
            reader.read_records(left, Some(&mut definition), Some(&mut repetition), &mut values)?;
        if read == 0 {
            break;
        }
        count += levels;
        left -= read;
    }
    let levels = Levels { count, values: values.len(), definition, repetition };
    Ok((levels, values_of(values)))
}

fn decimal(unscaled: i128, scale: i32) -> Cell<'static> {
    if scale == 0 {
        Cell::Integer(unscaled)
    } else {
        Cell::Number(unscaled as f64 / 10f64.powi(scale))
    }
}

/// A signed integer of at most 16 bytes; the lowest 16 of longer ones.
fn big_endian(bytes: &[u8]) -> i128 {
    let sign = if bytes.first().is_some_and(|first| first & 0x80 != 0) { -1 } else { 0 };
    bytes.iter().fold(sign, |number, &byte| number << 8 | i128::from(byte))
}

fn uuid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&hex(&[*byte]));
    }
    text
}
