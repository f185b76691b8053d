//! Reading a table, including one that another tool wrote, and its nulls where they have a meaning.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use hypercast_core::disk::File;
use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::{ByteArray, DataType};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, FileReader, Length, SerializedFileReader};
use parquet::schema::types::ColumnDescriptor;

use super::{CellType, Column, ColumnValues, Field, NULL_U32};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::ColumnDefaults;

/// Reads a table one row group at a time.
pub struct TableReader {
    path: PathBuf,
    reader: SerializedFileReader<TableFile>,
}

impl TableReader {
    /// Opens a Parquet file.
    pub fn open(path: &Path) -> Result<TableReader> {
        let file = File::open(path).map_err(Error::io(path))?;
        let length = file.length().map_err(Error::io(path))?;
        let file = TableFile { file: Arc::new(file), length };
        let reader = SerializedFileReader::new(file).map_err(Error::parquet(path))?;
        Ok(TableReader { path: path.to_path_buf(), reader })
    }

    /// The number of row groups.
    pub fn groups(&self) -> usize {
        self.reader.num_row_groups()
    }

    /// The number of rows in all row groups.
    pub fn rows(&self) -> usize {
        self.reader.metadata().file_metadata().num_rows().max(0) as usize
    }

    /// Whether the table has a column of that name.
    pub fn has(&self, name: &str) -> bool {
        self.column_index(name).is_some()
    }

    /// The value under `key` in the file's metadata.
    pub fn note(&self, key: &str) -> Option<&str> {
        let notes = self.reader.metadata().file_metadata().key_value_metadata()?;
        notes.iter().find(|note| note.key == key)?.value.as_deref()
    }

    /// The number of rows in a row group.
    pub fn group_rows(&self, group: usize) -> usize {
        self.reader.metadata().row_group(group).num_rows().max(0) as usize
    }

    /// Reads the columns `fields` of one row group.
    ///
    /// # Errors
    /// A column is missing, has another type, or has a null that means nothing.
    pub fn read(&self, group: usize, fields: &[Field]) -> Result<Vec<Column>> {
        fields.iter().map(|field| self.read_field(group, field)).collect()
    }

    /// As [`TableReader::read`], of a table whose schema may have grown since it was written.
    /// Columns that it may lack, and retired ones, are made up.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn read_grown(
        &self,
        group: usize,
        fields: &[Field],
        defaults: &ColumnDefaults,
    ) -> Result<Vec<Column>> {
        let rows = self.group_rows(group);
        let read = |field: &Field| match defaults.of(&field.name) {
            Some(missing) if defaults.is_retired(&field.name) || !self.has(&field.name) => {
                Ok(Column::repeated(field, missing, rows))
            }
            _ => self.read_field(group, field),
        };
        fields.iter().map(read).collect()
    }

    fn column_index(&self, name: &str) -> Option<usize> {
        let schema = self.reader.metadata().file_metadata().schema_descr();
        schema.columns().iter().position(|column| column.path().parts()[0] == name)
    }

    /// The cell of the first row in one column; none if the table has no row. A row group of any
    /// size is read no further than that.
    ///
    /// # Errors
    /// As [`TableReader::read`].
    pub(crate) fn read_first(&self, field: &Field) -> Result<Option<Column>> {
        let group = (0..self.groups()).find(|group| self.group_rows(*group) > 0);
        group.map(|group| self.read_rows(group, field, 1)).transpose()
    }

    fn read_field(&self, group: usize, field: &Field) -> Result<Column> {
        self.read_rows(group, field, self.group_rows(group))
    }

    /// The first `rows` rows of a column in a row group.
    fn read_rows(&self, group: usize, field: &Field, rows: usize) -> Result<Column> {
        let Some(index) = self.column_index(&field.name) else {
            return Err(Error::data(&self.path, format!("it has no column `{}`", field.name)));
        };
        let group = self.reader.get_row_group(group).map_err(Error::parquet(&self.path))?;
        let reader = group.get_column_reader(index).map_err(Error::parquet(&self.path))?;
        let descriptor = group.metadata().column(index).column_descr();
        let column =
            read_column(reader, field, rows, descriptor).map_err(Error::parquet(&self.path))?;
        column.ok_or_else(|| {
            let what = if field.list { "a list of " } else { "" };
            Error::data(
                &self.path,
                format!("column `{}` is not {what}{:?} in every row", field.name, field.kind),
            )
        })
    }
}

/// A table's bytes, as the Parquet library reads them.
struct TableFile {
    file: Arc<File>,
    length: u64,
}

/// Reads a table from an offset on.
struct TableBytes {
    file: Arc<File>,
    at: u64,
}

impl Length for TableFile {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for TableFile {
    type T = BufReader<TableBytes>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(BufReader::new(TableBytes { file: self.file.clone(), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let mut bytes = vec![0; length];
        TableBytes { file: self.file.clone(), at: start }.read_exact(&mut bytes)?;
        Ok(bytes.into())
    }
}

impl Read for TableBytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

/// Reads a column, of which `descriptor` is the file's own description; `None` if it has another
/// type than `field` or contains a null that means nothing.
fn read_column(
    reader: ColumnReader,
    field: &Field,
    rows: usize,
    descriptor: &ColumnDescriptor,
) -> std::result::Result<Option<Column>, ParquetError> {
    if descriptor.max_rep_level() != i16::from(field.list) {
        return Ok(None);
    }
    match (reader, field.kind) {
        (ColumnReader::Int64ColumnReader(r), CellType::I64) => {
            read_as(r, rows, descriptor, None, |cell| cell)
        }
        (ColumnReader::Int64ColumnReader(r), CellType::U64) => {
            read_as(r, rows, descriptor, field.zero_if_null.then_some(0), |cell| cell as u64)
        }
        (ColumnReader::Int32ColumnReader(r), CellType::U64) if field.mask_bits.is_some() => {
            read_as(r, rows, descriptor, None, |cell| u64::from(cell as u32))
        }
        (ColumnReader::Int32ColumnReader(r), CellType::I64) => {
            read_as(r, rows, descriptor, None, i64::from)
        }
        (ColumnReader::Int32ColumnReader(r), CellType::U32) => {
            read_as(r, rows, descriptor, field.nullable.then_some(NULL_U32), |cell| cell as u32)
        }
        (ColumnReader::FloatColumnReader(r), CellType::F32) => {
            read_as(r, rows, descriptor, Some(f32::NAN), |cell| cell)
        }
        (ColumnReader::BoolColumnReader(r), CellType::Bool) => {
            read_as(r, rows, descriptor, None, |cell| cell)
        }
        (ColumnReader::ByteArrayColumnReader(r), CellType::Text) => {
            let text = |cell: ByteArray| String::from_utf8_lossy(cell.data()).into_owned();
            read_as(r, rows, descriptor, field.nullable.then(String::new), text)
        }
        _ => Ok(None),
    }
}

/// As [`read_column`]; `null` stands for the nulls of scalars.
fn read_as<T: DataType, C: Clone>(
    mut reader: ColumnReaderImpl<T>,
    rows: usize,
    descriptor: &ColumnDescriptor,
    null: Option<C>,
    cell: impl FnMut(T::T) -> C,
) -> std::result::Result<Option<Column>, ParquetError>
where
    ColumnValues: FromIterator<C>,
{
    let max_definition = descriptor.max_def_level();
    let (mut values, mut definition, mut repetition) = (Vec::new(), Vec::new(), Vec::new());
    let (read, ..) =
        reader.read_records(rows, Some(&mut definition), Some(&mut repetition), &mut values)?;
    if read != rows {
        return Ok(None);
    }
    if descriptor.max_rep_level() == 0 && values.len() < rows {
        let Some(null) = null else { return Ok(None) };
        let mut values = values.into_iter().map(cell);
        let is_known = definition.iter().map(|&level| level == max_definition);
        let cells = is_known.map(|is_known| {
            let known = is_known.then(|| values.next().expect("one for each"));
            known.unwrap_or_else(|| null.clone())
        });
        return Ok(Some(Column { values: cells.collect(), offsets: None }));
    }
    let values = values.into_iter().map(cell).collect();
    if descriptor.max_rep_level() == 0 {
        return Ok(Some(Column { values, offsets: None }));
    }
    // A definition level below `empty` is a null list, `empty` itself an empty list; a level
    // between `empty` and the greatest is a null element.
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
    Ok(Some(Column { values, offsets: Some(offsets) }))
}
