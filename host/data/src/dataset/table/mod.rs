//! Tables in Parquet + zstd, column by column: the one place that knows the
//! file format. It does not know what a column means.
//!
//! Columns are required (no nulls) scalars or lists of scalars, so every data
//! tool reads them. Reading accepts optional columns too, as other tools write
//! them, as long as no cell is null.

mod reader;
mod writer;

pub use reader::TableReader;
pub use writer::TableWriter;

use std::ops::Range;

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
        Field { name: name.into(), kind, list: false }
    }

    /// A column of lists.
    pub fn list(name: impl Into<String>, kind: Kind) -> Field {
        Field { name: name.into(), kind, list: true }
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
        Column { values, offsets: None }
    }

    /// A column of lists.
    pub fn lists(values: Values, offsets: Vec<usize>) -> Column {
        Column { values, offsets: Some(offsets) }
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
        let Values::U64(values) = &self.values else { panic!("not a column of u64") };
        values
    }

    /// The cells of a `Kind::I64` column.
    pub fn i64s(&self) -> &[i64] {
        let Values::I64(values) = &self.values else { panic!("not a column of i64") };
        values
    }

    /// The cells of a `Kind::U32` column.
    pub fn u32s(&self) -> &[u32] {
        let Values::U32(values) = &self.values else { panic!("not a column of u32") };
        values
    }

    /// The cells of a `Kind::F32` column.
    pub fn f32s(&self) -> &[f32] {
        let Values::F32(values) = &self.values else { panic!("not a column of f32") };
        values
    }

    /// The cells of a `Kind::Bool` column.
    pub fn bools(&self) -> &[bool] {
        let Values::Bool(values) = &self.values else { panic!("not a column of bool") };
        values
    }

    /// The cells of a `Kind::Text` column.
    pub fn texts(&self) -> &[String] {
        let Values::Text(values) = &self.values else { panic!("not a column of text") };
        values
    }
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
                Column::lists(Values::F32(vec![0.1, f32::NEG_INFINITY, -0.0]), vec![0, 0, 3, 3]),
                Column::lists(Values::I64(vec![-1, 2]), vec![0, 1, 1, 2]),
            ]
        };
        let mut writer = TableWriter::create(&path, fields.clone()).unwrap();
        writer.write(&group(0)).unwrap();
        assert!(!path.exists(), "an unfinished table has no name");
        writer.write(&group(1)).unwrap();
        writer.note("what", "a test".into());
        writer.finish().unwrap();
        let reader = TableReader::open(&path).unwrap();
        assert_eq!((reader.note("what"), reader.note("who")), (Some("a test"), None));
        assert_eq!(reader.group_rows(1), 3);
        assert_eq!((reader.groups(), reader.rows()), (2, 6));
        assert_eq!(reader.read(0, &fields).unwrap(), group(0));
        assert_eq!(reader.read(1, &fields).unwrap(), group(1));
        let message = reader.read(0, &[Field::new("age", Kind::U64)]).unwrap_err().to_string();
        assert!(message.contains("t.parquet") && message.contains("`age`"), "{message}");
        let message = reader.read(0, &[Field::new("tae", Kind::F32)]).unwrap_err().to_string();
        assert!(message.contains("`tae` is not F32"), "{message}");
    }
}
