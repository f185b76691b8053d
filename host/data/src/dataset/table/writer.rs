//! Writing a table: columns, zstd, and the final name once the file is complete. The
//! columns of a row group are encoded in parallel, in memory.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use hypercast_core::{atomic_file, disk::File};
use parquet::basic::{Compression, Encoding, LogicalType, Repetition, Type as Physical, ZstdLevel};
use parquet::column::writer::{ColumnCloseResult, get_column_writer, get_typed_column_writer};
use parquet::data_type::{
    BoolType, ByteArray, ByteArrayType, DataType, FloatType, Int32Type, Int64Type,
};
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{WriterProperties, WriterPropertiesPtr};
use parquet::file::writer::{SerializedFileWriter, SerializedPageWriter, TrackedWrite};
use parquet::schema::types::{ColumnDescPtr, ColumnPath, Type, TypePtr};
use rayon::prelude::*;

use super::{CellType, Column, ColumnValues, Field, NULL_U32};
use crate::error::{CommonErrors as _, Error, Result};

type ParquetResult<T> = std::result::Result<T, ParquetError>;

/// Writes a table one row group at a time. The file gets its name when it is finished.
pub struct TableWriter {
    path: PathBuf,
    temporary: PathBuf,
    fields: Vec<Field>,
    properties: WriterPropertiesPtr,
    writer: SerializedFileWriter<File>,
}

impl TableWriter {
    /// Opens a temporary file beside `path`.
    pub fn create(path: &Path, fields: Vec<Field>) -> Result<TableWriter> {
        let temporary = atomic_file::draft_path(path);
        let file = File::create(&temporary).map_err(Error::io(&temporary))?;
        let properties = Arc::new(properties(&fields));
        let writer = table_type(&fields)
            .and_then(|schema| SerializedFileWriter::new(file, schema, properties.clone()))
            .map_err(Error::parquet(&temporary))?;
        Ok(TableWriter { path: path.to_path_buf(), temporary, fields, properties, writer })
    }

    /// Writes one row group: a column for each field, in their order, all of the same length.
    pub fn write(&mut self, columns: &[Column]) -> Result<()> {
        assert_eq!(columns.len(), self.fields.len(), "one column a field");
        let schema = self.writer.schema_descr();
        let encoded = columns.par_iter().enumerate().map(|(at, column)| {
            let encoder = ColumnEncoder { of: schema.column(at), properties: &self.properties };
            encoder.encode(column)
        });
        let encoded: Vec<EncodedColumn> =
            encoded.collect::<ParquetResult<_>>().map_err(Error::parquet(&self.temporary))?;
        let append = || {
            let mut group = self.writer.next_row_group()?;
            for EncodedColumn { bytes, close } in encoded {
                group.append_column(&bytes, close)?;
            }
            group.close().map(|_| ())
        };
        append().map_err(Error::parquet(&self.temporary))
    }

    /// Adds an entry to the file's metadata, where any reader of Parquet finds it.
    pub fn note(&mut self, key: &str, value: String) {
        self.writer.append_key_value_metadata(KeyValue::new(key.to_owned(), value));
    }

    /// Writes the file's footer, syncs it to disk and renames it to its final name.
    pub fn finish(self) -> Result<()> {
        let file = self.writer.into_inner().map_err(Error::parquet(&self.temporary))?;
        file.sync_all().map_err(Error::io(&self.temporary))?;
        atomic_file::rename(&self.temporary, &self.path).map_err(Error::io(&self.path))
    }
}

fn properties(fields: &[Field]) -> WriterProperties {
    let level = ZstdLevel::try_new(3).expect("3 is a zstd level");
    let builder = WriterProperties::builder().set_compression(Compression::ZSTD(level));
    // Times hardly repeat either; their differences are small.
    let times = fields.iter().filter(|field| field.kind == CellType::I64);
    let builder = times.fold(builder, |builder, field| {
        builder
            .set_column_dictionary_enabled(path_of(field), false)
            .set_column_encoding(path_of(field), Encoding::DELTA_BINARY_PACKED)
    });
    // Floats hardly repeat, so a dictionary would be built and then discarded. Splitting their
    // bytes by position lets exponents compress, and the zero bytes at the end of values rounded to
    // bf16.
    let floats = fields.iter().filter(|field| field.kind == CellType::F32);
    floats
        .fold(builder, |builder, field| {
            builder
                .set_column_dictionary_enabled(path_of(field), false)
                .set_column_encoding(path_of(field), Encoding::BYTE_STREAM_SPLIT)
        })
        .build()
}

fn path_of(field: &Field) -> ColumnPath {
    if field.list {
        ColumnPath::new(vec![field.name.clone(), "list".into(), "element".into()])
    } else {
        ColumnPath::from(field.name.clone())
    }
}

fn table_type(fields: &[Field]) -> ParquetResult<TypePtr> {
    let columns = fields.iter().map(field_type).collect::<ParquetResult<Vec<_>>>()?;
    Ok(Arc::new(Type::group_type_builder("table").with_fields(columns).build()?))
}

fn field_type(field: &Field) -> ParquetResult<TypePtr> {
    if !field.list {
        let of = if field.nullable { Repetition::OPTIONAL } else { Repetition::REQUIRED };
        return scalar_type(&field.name, field.stored_kind(), of);
    }
    let list = Type::group_type_builder("list")
        .with_repetition(Repetition::REPEATED)
        .with_fields(vec![scalar_type("element", field.stored_kind(), Repetition::REQUIRED)?])
        .build()?;
    let outer = Type::group_type_builder(&field.name)
        .with_repetition(Repetition::REQUIRED)
        .with_logical_type(Some(LogicalType::List))
        .with_fields(vec![Arc::new(list)])
        .build()?;
    Ok(Arc::new(outer))
}

fn scalar_type(name: &str, kind: CellType, repetition: Repetition) -> ParquetResult<TypePtr> {
    let unsigned = |bit_width| Some(LogicalType::Integer { bit_width, is_signed: false });
    let (physical, logical) = match kind {
        CellType::U64 => (Physical::INT64, unsigned(64)),
        CellType::I64 => (Physical::INT64, None),
        CellType::U32 => (Physical::INT32, unsigned(32)),
        CellType::F32 => (Physical::FLOAT, None),
        CellType::Bool => (Physical::BOOLEAN, None),
        CellType::Text => (Physical::BYTE_ARRAY, Some(LogicalType::String)),
    };
    let builder = Type::primitive_type_builder(name, physical).with_repetition(repetition);
    Ok(Arc::new(builder.with_logical_type(logical).build()?))
}

/// A column of a row group as it stands in the file.
struct EncodedColumn {
    bytes: Bytes,
    close: ColumnCloseResult,
}

/// Encodes a column of a row group.
struct ColumnEncoder<'a> {
    of: ColumnDescPtr,
    properties: &'a WriterPropertiesPtr,
}

impl ColumnEncoder<'_> {
    fn encode(self, column: &Column) -> ParquetResult<EncodedColumn> {
        let offsets = column.offsets.as_deref();
        let may_be_null = self.of.max_def_level() > 0 && offsets.is_none();
        match &column.values {
            ColumnValues::U32(v) if may_be_null => {
                let cells = v.iter().map(|&x| (x != NULL_U32).then_some(x as i32));
                self.encode_known::<Int32Type>(cells)
            }
            ColumnValues::F32(v) if may_be_null => {
                self.encode_known::<FloatType>(v.iter().map(|&x| (!x.is_nan()).then_some(x)))
            }
            ColumnValues::Text(v) if may_be_null => {
                let known =
                    |text: &String| (!text.is_empty()).then(|| ByteArray::from(text.as_str()));
                self.encode_known::<ByteArrayType>(v.iter().map(known))
            }
            // Masks of at most 32 bits.
            ColumnValues::U64(v) if self.of.physical_type() == Physical::INT32 => self
                .encode_as::<Int32Type>(&v.iter().map(|&x| x as i32).collect::<Vec<_>>(), offsets),
            ColumnValues::U64(v) => self
                .encode_as::<Int64Type>(&v.iter().map(|&x| x as i64).collect::<Vec<_>>(), offsets),
            ColumnValues::I64(v) => self.encode_as::<Int64Type>(v, offsets),
            ColumnValues::U32(v) => self
                .encode_as::<Int32Type>(&v.iter().map(|&x| x as i32).collect::<Vec<_>>(), offsets),
            ColumnValues::F32(v) => self.encode_as::<FloatType>(v, offsets),
            ColumnValues::Bool(v) => self.encode_as::<BoolType>(v, offsets),
            ColumnValues::Text(v) => {
                let bytes: Vec<ByteArray> =
                    v.iter().map(|text| ByteArray::from(text.as_str())).collect();
                self.encode_as::<ByteArrayType>(&bytes, offsets)
            }
        }
    }

    /// Cells without lists, some of which are null.
    fn encode_known<T: DataType>(
        self,
        cells: impl Iterator<Item = Option<T::T>>,
    ) -> ParquetResult<EncodedColumn> {
        let cells: Vec<Option<T::T>> = cells.collect();
        let definition: Vec<i16> = cells.iter().map(|cell| i16::from(cell.is_some())).collect();
        let known: Vec<T::T> = cells.into_iter().flatten().collect();
        self.encode_at::<T>(&known, Some(&definition), None)
    }

    fn encode_as<T: DataType>(
        self,
        values: &[T::T],
        offsets: Option<&[usize]>,
    ) -> ParquetResult<EncodedColumn> {
        match offsets {
            None => self.encode_at::<T>(values, None, None),
            Some(offsets) => {
                let (definition, repetition) = levels(offsets);
                self.encode_at::<T>(values, Some(&definition), Some(&repetition))
            }
        }
    }

    fn encode_at<T: DataType>(
        self,
        values: &[T::T],
        definition: Option<&[i16]>,
        repetition: Option<&[i16]>,
    ) -> ParquetResult<EncodedColumn> {
        let mut bytes = TrackedWrite::new(Vec::new());
        let pages = Box::new(SerializedPageWriter::new(&mut bytes));
        let writer = get_column_writer(self.of, self.properties.clone(), pages);
        let mut writer = get_typed_column_writer::<T>(writer);
        writer.write_batch(values, definition, repetition)?;
        let close = writer.close()?;
        Ok(EncodedColumn { bytes: bytes.into_inner()?.into(), close })
    }
}

/// Dremel levels of required lists of required elements: an empty list is one entry with definition
/// level 0, and every element but a list's first has repetition level 1.
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
