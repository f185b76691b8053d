//! Logs in Parquet of two rows, in which a column may have another type than usual.

use std::sync::Arc;

use parquet::data_type::{ByteArrayType, DataType, DoubleType, Int32Type, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// A log, by the columns that vary.
pub(super) struct TypedLog {
    pub(super) user: TypedColumn,
    pub(super) at: TypedColumn,
    pub(super) price: TypedColumn,
}

/// A column with its type, as Parquet's own language says it.
pub(super) struct TypedColumn {
    /// As `int64`.
    physical: &'static str,
    /// As `DATE`; may be empty.
    logical: &'static str,
    values: Values,
}

/// The values of a column.
pub(super) enum Values {
    Int32([i32; 2]),
    Int64([i64; 2]),
    Double([f64; 2]),
    Text([&'static str; 2]),
}

impl TypedColumn {
    pub(super) fn new(logical: &'static str, values: Values) -> TypedColumn {
        let physical = match values {
            Values::Int32(_) => "int32",
            Values::Int64(_) => "int64",
            Values::Double(_) => "double",
            Values::Text(_) => "binary",
        };
        TypedColumn { physical, logical, values }
    }

    fn declare(&self, name: &str) -> String {
        let logical =
            if self.logical.is_empty() { String::new() } else { format!(" ({})", self.logical) };
        format!("required {} {name}{logical};", self.physical)
    }
}

impl Default for TypedLog {
    /// Of the usual types.
    fn default() -> TypedLog {
        let times = Values::Int64([1_763_978_400_000, 1_763_978_460_000]);
        TypedLog {
            user: TypedColumn::new("", Values::Int64([1, 2])),
            at: TypedColumn::new("TIMESTAMP(MILLIS,true)", times),
            price: TypedColumn::new("", Values::Double([2.5, 0.5])),
        }
    }
}

impl TypedLog {
    /// The bytes of the file.
    pub(super) fn written(self) -> Vec<u8> {
        let columns = [
            ("user", self.user),
            ("item", TypedColumn::new("", Values::Int64([10, 11]))),
            ("at", self.at),
            ("clicked", TypedColumn::new("", Values::Int32([1, 0]))),
            ("price", self.price),
            ("device", TypedColumn::new("STRING", Values::Text(["phone", "tablet"]))),
        ];
        let declared: String = columns.iter().map(|(name, column)| column.declare(name)).collect();
        let schema =
            Arc::new(parse_message_type(&format!("message log {{ {declared} }}")).unwrap());
        let properties = Arc::new(WriterProperties::default());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        for (_, column) in &columns {
            let mut next = group.next_column().unwrap().unwrap();
            let written = match &column.values {
                Values::Int32(values) => next.typed::<Int32Type>().write_batch(values, None, None),
                Values::Int64(values) => next.typed::<Int64Type>().write_batch(values, None, None),
                Values::Double(values) => {
                    next.typed::<DoubleType>().write_batch(values, None, None)
                }
                Values::Text(values) => {
                    let values = values.map(<ByteArrayType as DataType>::T::from);
                    next.typed::<ByteArrayType>().write_batch(&values, None, None)
                }
            };
            assert_eq!(written.unwrap(), 2);
            next.close().unwrap();
        }
        group.close().unwrap();
        writer.into_inner().unwrap()
    }
}
