//! Tables in Parquet + zstd, column by column: the one place that knows the
//! file format. It does not know what a column means.
//!
//! Columns are required (no nulls) scalars or lists of scalars, so every data
//! tool reads them. Reading accepts optional columns too, as other tools write
//! them, as long as no cell is null.

use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, LogicalType, Repetition, Type as Physical, ZstdLevel};
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, FloatType, Int32Type, Int64Type,
};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::types::{ColumnDescriptor, ColumnPath, Type, TypePtr};

use crate::error::{Error, Result};

/// What a column's cells are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Unsigned 64-bit.
    U64,
    /// Signed 64-bit.
    I64,
    /// Unsigned 32-bit.
    U32,
    /// 32-bit float.
    F32,
    /// True or false.
    Bool,
    /// UTF-8 text.
    Text,
}

/// A column's name and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The column's name.
    pub name: String,
    /// What its cells, or its lists' elements, are.
    pub kind: Kind,
    /// Whether a cell is a list.
    pub list: bool,
}

impl Field {
    /// A scalar column.
    pub fn new(name: impl Into<String>, kind: Kind) -> Field {
        Field {
            name: name.into(),
            kind,
            list: false,
        }
    }

    /// A column of lists.
    pub fn list(name: impl Into<String>, kind: Kind) -> Field {
        Field {
            name: name.into(),
            kind,
            list: true,
        }
    }
}

/// The cells of a column, or the elements of all its lists one after the other.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Unsigned 64-bit.
    U64(Vec<u64>),
    /// Signed 64-bit.
    I64(Vec<i64>),
    /// Unsigned 32-bit.
    U32(Vec<u32>),
    /// 32-bit float.
    F32(Vec<f32>),
    /// True or false.
    Bool(Vec<bool>),
    /// UTF-8 text.
    Text(Vec<String>),
}

/// A column of one row group.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// The cells.
    pub values: Values,
    /// Where each row's list starts, and at the end the number of elements; `None` for scalars.
    pub offsets: Option<Vec<usize>>,
}

impl Column {
    /// A column of scalars.
    pub fn scalars(values: Values) -> Column {
        Column {
            values,
            offsets: None,
        }
    }

    /// A column of lists.
    pub fn lists(values: Values, offsets: Vec<usize>) -> Column {
        Column {
            values,
            offsets: Some(offsets),
        }
    }

    /// Where row `row`'s elements lie in `values`.
    pub fn range(&self, row: usize) -> Range<usize> {
        match &self.offsets {
            Some(offsets) => offsets[row]..offsets[row + 1],
            None => row..row + 1,
        }
    }

    /// The cells of a `Kind::U64` column; another kind is a programmer's error, here and below.
    pub fn u64s(&self) -> &[u64] {
        let Values::U64(values) = &self.values else {
            panic!("not a column of u64")
        };
        values
    }

    /// The cells of a `Kind::I64` column.
    pub fn i64s(&self) -> &[i64] {
        let Values::I64(values) = &self.values else {
            panic!("not a column of i64")
        };
        values
    }

    /// The cells of a `Kind::U32` column.
    pub fn u32s(&self) -> &[u32] {
        let Values::U32(values) = &self.values else {
            panic!("not a column of u32")
        };
        values
    }

    /// The cells of a `Kind::F32` column.
    pub fn f32s(&self) -> &[f32] {
        let Values::F32(values) = &self.values else {
            panic!("not a column of f32")
        };
        values
    }

    /// The cells of a `Kind::Bool` column.
    pub fn bools(&self) -> &[bool] {
        let Values::Bool(values) = &self.values else {
            panic!("not a column of bool")
        };
        values
    }

    /// The cells of a `Kind::Text` column.
    pub fn texts(&self) -> &[String] {
        let Values::Text(values) = &self.values else {
            panic!("not a column of text")
        };
        values
    }
}

/// Writes a table one row group at a time. The file appears under its name only
/// when it is finished.
pub struct TableWriter {
    path: PathBuf,
    temporary: PathBuf,
    fields: Vec<Field>,
    writer: SerializedFileWriter<File>,
}

impl TableWriter {
    /// Opens `path` with `.tmp` appended for writing.
    pub fn create(path: &Path, fields: Vec<Field>) -> Result<TableWriter> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let temporary = PathBuf::from(temporary);
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        let writer = table_type(&fields)
            .and_then(|schema| {
                SerializedFileWriter::new(file, schema, Arc::new(properties(&fields)))
            })
            .map_err(Error::parquet(&temporary))?;
        Ok(TableWriter {
            path: path.to_path_buf(),
            temporary,
            fields,
            writer,
        })
    }

    /// Writes one row group: `columns` in the order of the fields, all of the same length.
    pub fn write(&mut self, columns: &[Column]) -> Result<()> {
        assert_eq!(columns.len(), self.fields.len(), "one column a field");
        let mut group = self
            .writer
            .next_row_group()
            .map_err(Error::parquet(&self.temporary))?;
        for column in columns {
            write_column(&mut group, column).map_err(Error::parquet(&self.temporary))?;
        }
        group.close().map_err(Error::parquet(&self.temporary))?;
        Ok(())
    }

    /// Completes the file on disk and gives it its name.
    pub fn finish(self) -> Result<()> {
        let file = self
            .writer
            .into_inner()
            .map_err(Error::parquet(&self.temporary))?;
        file.sync_all().map_err(Error::io(&self.temporary))?;
        fs::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))
    }
}

/// Reads a table one row group at a time.
pub struct TableReader {
    path: PathBuf,
    reader: SerializedFileReader<File>,
}

impl TableReader {
    /// Opens a Parquet file.
    pub fn open(path: &Path) -> Result<TableReader> {
        let file = File::open(path).map_err(Error::io(path))?;
        let reader = SerializedFileReader::new(file).map_err(Error::parquet(path))?;
        Ok(TableReader {
            path: path.to_path_buf(),
            reader,
        })
    }

    /// The number of row groups.
    pub fn groups(&self) -> usize {
        self.reader.num_row_groups()
    }

    /// The number of rows in all.
    pub fn rows(&self) -> usize {
        self.reader.metadata().file_metadata().num_rows().max(0) as usize
    }

    /// Whether the table has a column of that name.
    pub fn has(&self, name: &str) -> bool {
        self.column_index(name).is_some()
    }

    /// Reads the named columns of one row group.
    pub fn read(&self, group: usize, fields: &[Field]) -> Result<Vec<Column>> {
        fields
            .iter()
            .map(|field| self.read_field(group, field))
            .collect()
    }

    fn column_index(&self, name: &str) -> Option<usize> {
        let schema = self.reader.metadata().file_metadata().schema_descr();
        schema
            .columns()
            .iter()
            .position(|column| column.path().parts()[0] == name)
    }

    fn read_field(&self, group: usize, field: &Field) -> Result<Column> {
        let Some(index) = self.column_index(&field.name) else {
            return Err(Error::data(
                &self.path,
                format!("it has no column `{}`", field.name),
            ));
        };
        let group = self
            .reader
            .get_row_group(group)
            .map_err(Error::parquet(&self.path))?;
        let rows = group.metadata().num_rows().max(0) as usize;
        let reader = group
            .get_column_reader(index)
            .map_err(Error::parquet(&self.path))?;
        let descriptor = group.metadata().column(index).column_descr();
        let asked = Asked {
            field,
            rows,
            descriptor,
        };
        let column = read_column(reader, &asked).map_err(Error::parquet(&self.path))?;
        column.ok_or_else(|| {
            let what = if field.list { "a list of " } else { "" };
            Error::data(
                &self.path,
                format!(
                    "column `{}` is not {what}{:?} in every row",
                    field.name, field.kind
                ),
            )
        })
    }
}

fn properties(fields: &[Field]) -> WriterProperties {
    let level = ZstdLevel::try_new(3).expect("3 is a zstd level");
    let builder = WriterProperties::builder().set_compression(Compression::ZSTD(level));
    // Floats hardly repeat: a dictionary would only be built to be thrown away.
    let floats = fields.iter().filter(|field| field.kind == Kind::F32);
    floats
        .fold(builder, |builder, field| {
            builder.set_column_dictionary_enabled(path_of(field), false)
        })
        .build()
}

fn path_of(field: &Field) -> ColumnPath {
    match field.list {
        false => ColumnPath::from(field.name.clone()),
        true => ColumnPath::new(vec![field.name.clone(), "list".into(), "element".into()]),
    }
}

fn table_type(fields: &[Field]) -> std::result::Result<TypePtr, ParquetError> {
    let columns = fields
        .iter()
        .map(field_type)
        .collect::<std::result::Result<Vec<_>, _>>()?;
    Ok(Arc::new(
        Type::group_type_builder("table")
            .with_fields(columns)
            .build()?,
    ))
}

fn field_type(field: &Field) -> std::result::Result<TypePtr, ParquetError> {
    if !field.list {
        return scalar_type(&field.name, field.kind);
    }
    let list = Type::group_type_builder("list")
        .with_repetition(Repetition::REPEATED)
        .with_fields(vec![scalar_type("element", field.kind)?])
        .build()?;
    let outer = Type::group_type_builder(&field.name)
        .with_repetition(Repetition::REQUIRED)
        .with_logical_type(Some(LogicalType::List))
        .with_fields(vec![Arc::new(list)])
        .build()?;
    Ok(Arc::new(outer))
}

fn scalar_type(name: &str, kind: Kind) -> std::result::Result<TypePtr, ParquetError> {
    let unsigned = |bit_width| {
        Some(LogicalType::Integer {
            bit_width,
            is_signed: false,
        })
    };
    let (physical, logical) = match kind {
        Kind::U64 => (Physical::INT64, unsigned(64)),
        Kind::I64 => (Physical::INT64, None),
        Kind::U32 => (Physical::INT32, unsigned(32)),
        Kind::F32 => (Physical::FLOAT, None),
        Kind::Bool => (Physical::BOOLEAN, None),
        Kind::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
    };
    let builder =
        Type::primitive_type_builder(name, physical).with_repetition(Repetition::REQUIRED);
    Ok(Arc::new(builder.with_logical_type(logical).build()?))
}

fn write_column(
    group: &mut SerializedRowGroupWriter<'_, File>,
    column: &Column,
) -> std::result::Result<(), ParquetError> {
    let offsets = column.offsets.as_deref();
    match &column.values {
        Values::U64(v) => write_as::<Int64Type>(
            group,
            &v.iter().map(|&x| x as i64).collect::<Vec<_>>(),
            offsets,
        ),
        Values::I64(v) => write_as::<Int64Type>(group, v, offsets),
        Values::U32(v) => write_as::<Int32Type>(
            group,
            &v.iter().map(|&x| x as i32).collect::<Vec<_>>(),
            offsets,
        ),
        Values::F32(v) => write_as::<FloatType>(group, v, offsets),
        Values::Bool(v) => write_as::<BoolType>(group, v, offsets),
        Values::Text(v) => {
            let bytes: Vec<ByteArray> = v
                .iter()
                .map(|text| ByteArray::from(text.as_str()))
                .collect();
            write_as::<ByteArrayType>(group, &bytes, offsets)
        }
    }
}

fn write_as<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, File>,
    values: &[T::T],
    offsets: Option<&[usize]>,
) -> std::result::Result<(), ParquetError> {
    let mut writer = group.next_column()?.expect("as many columns as fields");
    match offsets {
        None => writer.typed::<T>().write_batch(values, None, None)?,
        Some(offsets) => {
            let (definition, repetition) = levels(offsets);
            writer
                .typed::<T>()
                .write_batch(values, Some(&definition), Some(&repetition))?
        }
    };
    writer.close()
}

/// Dremel levels of required lists of required elements: an empty list is one entry of definition 0,
/// and every element but a list's first repeats.
fn levels(offsets: &[usize]) -> (Vec<i16>, Vec<i16>) {
    let (mut definition, mut repetition) = (Vec::new(), Vec::new());
    for pair in offsets.windows(2) {
        let length = pair[1] - pair[0];
        definition.extend(std::iter::repeat_n(i16::from(length > 0), length.max(1)));
        repetition.push(0);
        repetition.extend(std::iter::repeat_n(1, length.saturating_sub(1)));
    }
    (definition, repetition)
}

/// What `read_column` is to read, and how the file holds it.
struct Asked<'a> {
    field: &'a Field,
    rows: usize,
    descriptor: &'a ColumnDescriptor,
}

/// `None` where the file's column is of another type or holds nulls.
fn read_column(
    reader: ColumnReader,
    asked: &Asked<'_>,
) -> std::result::Result<Option<Column>, ParquetError> {
    match (reader, asked.field.kind) {
        (ColumnReader::Int64ColumnReader(r), Kind::I64) => read_as(r, asked, |v| Values::I64(v)),
        (ColumnReader::Int64ColumnReader(r), Kind::U64) => read_as(r, asked, |v| {
            Values::U64(v.into_iter().map(|x| x as u64).collect())
        }),
        (ColumnReader::Int32ColumnReader(r), Kind::I64) => read_as(r, asked, |v| {
            Values::I64(v.into_iter().map(i64::from).collect())
        }),
        (ColumnReader::Int32ColumnReader(r), Kind::U32) => read_as(r, asked, |v| {
            Values::U32(v.into_iter().map(|x| x as u32).collect())
        }),
        (ColumnReader::FloatColumnReader(r), Kind::F32) => read_as(r, asked, |v| Values::F32(v)),
        (ColumnReader::BoolColumnReader(r), Kind::Bool) => read_as(r, asked, |v| Values::Bool(v)),
        (ColumnReader::ByteArrayColumnReader(r), Kind::Text) => read_as(r, asked, |v| {
            Values::Text(
                v.iter()
                    .map(|bytes| String::from_utf8_lossy(bytes.data()).into_owned())
                    .collect(),
            )
        }),
        _ => Ok(None),
    }
}

fn read_as<T: DataType>(
    mut reader: ColumnReaderImpl<T>,
    asked: &Asked<'_>,
    wrap: impl FnOnce(Vec<T::T>) -> Values,
) -> std::result::Result<Option<Column>, ParquetError> {
    let descriptor = asked.descriptor;
    let (max_definition, max_repetition) = (descriptor.max_def_level(), descriptor.max_rep_level());
    if max_repetition != i16::from(asked.field.list) {
        return Ok(None);
    }
    let rows = asked.rows;
    let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
    let (read, ..) = reader.read_records(
        rows,
        Some(&mut definition),
        Some(&mut repetition),
        &mut values,
    )?;
    if read != rows {
        return Ok(None);
    }
    if !asked.field.list {
        return Ok((values.len() == rows).then(|| Column::scalars(wrap(values))));
    }
    // Below `empty` the list itself is null, at `empty` it has no element, between that and the
    // greatest level an element is null.
    let empty = max_definition - 1 - i16::from(descriptor.self_type().is_optional());
    if definition
        .iter()
        .any(|&level| level > empty && level < max_definition)
    {
        return Ok(None);
    }
    let mut offsets = Vec::with_capacity(rows + 1);
    let mut elements = 0;
    for (&definition, &repetition) in definition.iter().zip(&repetition) {
        if repetition == 0 {
            offsets.push(elements);
        }
        elements += usize::from(definition == max_definition);
    }
    offsets.push(elements);
    Ok(Some(Column::lists(wrap(values), offsets)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let fields = vec![
            Field::new("id", Kind::U64),
            Field::new("name", Kind::Text),
            Field::new("flag", Kind::Bool),
            Field::list("tae", Kind::F32),
            Field::list("when", Kind::I64),
        ];
        let group = |shift: u64| {
            vec![
                Column::scalars(Values::U64(vec![u64::MAX - shift, shift, 7])),
                Column::scalars(Values::Text(vec!["é".into(), "".into(), "x".into()])),
                Column::scalars(Values::Bool(vec![true, false, true])),
                Column::lists(
                    Values::F32(vec![0.1, f32::NEG_INFINITY, -0.0]),
                    vec![0, 0, 3, 3],
                ),
                Column::lists(Values::I64(vec![-1, 2]), vec![0, 1, 1, 2]),
            ]
        };
        let mut writer = TableWriter::create(&path, fields.clone()).unwrap();
        writer.write(&group(0)).unwrap();
        assert!(!path.exists(), "an unfinished table has no name");
        writer.write(&group(1)).unwrap();
        writer.finish().unwrap();
        let reader = TableReader::open(&path).unwrap();
        assert_eq!((reader.groups(), reader.rows()), (2, 6));
        assert_eq!(reader.read(0, &fields).unwrap(), group(0));
        assert_eq!(reader.read(1, &fields).unwrap(), group(1));
        let message = reader
            .read(0, &[Field::new("age", Kind::U64)])
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("t.parquet") && message.contains("`age`"),
            "{message}"
        );
        let message = reader
            .read(0, &[Field::new("tae", Kind::F32)])
            .unwrap_err()
            .to_string();
        assert!(message.contains("`tae` is not F32"), "{message}");
    }
}
