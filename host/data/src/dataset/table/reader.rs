//! Reading a table, also one that another tool wrote, as long as no cell is null.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::{Column, Field, Kind, Values};
use crate::error::{CommonErrors as _, Error, Result};

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
        Ok(TableReader { path: path.to_path_buf(), reader })
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

    /// What the writer noted about the whole table under `key`.
    pub fn note(&self, key: &str) -> Option<&str> {
        let notes = self.reader.metadata().file_metadata().key_value_metadata()?;
        notes.iter().find(|note| note.key == key)?.value.as_deref()
    }

    /// The number of rows of a row group.
    pub fn group_rows(&self, group: usize) -> usize {
        self.reader.metadata().row_group(group).num_rows().max(0) as usize
    }

    /// Reads the named columns of one row group.
    pub fn read(&self, group: usize, fields: &[Field]) -> Result<Vec<Column>> {
        fields.iter().map(|field| self.read_field(group, field)).collect()
    }

    fn column_index(&self, name: &str) -> Option<usize> {
        let schema = self.reader.metadata().file_metadata().schema_descr();
        schema.columns().iter().position(|column| column.path().parts()[0] == name)
    }

    fn read_field(&self, group: usize, field: &Field) -> Result<Column> {
        let Some(index) = self.column_index(&field.name) else {
            return Err(Error::data(&self.path, format!("it has no column `{}`", field.name)));
        };
        let group = self.reader.get_row_group(group).map_err(Error::parquet(&self.path))?;
        let rows = group.metadata().num_rows().max(0) as usize;
        let reader = group.get_column_reader(index).map_err(Error::parquet(&self.path))?;
        let descriptor = group.metadata().column(index).column_descr();
        let asked = Asked { field, rows, descriptor };
        let column = read_column(reader, &asked).map_err(Error::parquet(&self.path))?;
        column.ok_or_else(|| {
            let what = if field.list { "a list of " } else { "" };
            Error::data(
                &self.path,
                format!("column `{}` is not {what}{:?} in every row", field.name, field.kind),
            )
        })
    }
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
        (ColumnReader::Int64ColumnReader(r), Kind::I64) => read_as(r, asked, Values::I64),
        (ColumnReader::Int64ColumnReader(r), Kind::U64) => {
            read_as(r, asked, |v| Values::U64(v.into_iter().map(|x| x as u64).collect()))
        }
        (ColumnReader::Int32ColumnReader(r), Kind::I64) => {
            read_as(r, asked, |v| Values::I64(v.into_iter().map(i64::from).collect()))
        }
        (ColumnReader::Int32ColumnReader(r), Kind::U32) => {
            read_as(r, asked, |v| Values::U32(v.into_iter().map(|x| x as u32).collect()))
        }
        (ColumnReader::FloatColumnReader(r), Kind::F32) => read_as(r, asked, Values::F32),
        (ColumnReader::BoolColumnReader(r), Kind::Bool) => read_as(r, asked, Values::Bool),
        (ColumnReader::ByteArrayColumnReader(r), Kind::Text) => read_as(r, asked, |v| {
            Values::Text(
                v.iter().map(|bytes| String::from_utf8_lossy(bytes.data()).into_owned()).collect(),
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
    let (read, ..) =
        reader.read_records(rows, Some(&mut definition), Some(&mut repetition), &mut values)?;
    if read != rows {
        return Ok(None);
    }
    if !asked.field.list {
        return Ok((values.len() == rows).then(|| Column::scalars(wrap(values))));
    }
    // Below `empty` the list itself is null, at `empty` it has no element, between that and the
    // greatest level an element is null.
    let empty = max_definition - 1 - i16::from(descriptor.self_type().is_optional());
    if definition.iter().any(|&level| level > empty && level < max_definition) {
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
