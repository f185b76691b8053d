//! Tables in Parquet with zstd, read and written column by column. Only this module knows the file
//! format; it does not know what a column means.
//!
//! Columns are scalars or lists of scalars, which every data tool reads, without nulls but where a
//! column is made for them ([`Field::nullable`]). A table from another tool may declare its columns
//! optional: a null is NaN among floats, and 0 where the reader asks for a category
//! ([`Field::category`]); anywhere else it is an error.

mod reader;
mod writer;

use std::ops::Range;

pub use reader::TableReader;
pub use writer::TableWriter;

/// What stands for a null among numbers of 32 bits ([`Field::nullable`]).
pub const NULL_U32: u32 = u32::MAX;

/// The type of a column's cells, or of its lists' elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CellType {
    /// Unsigned 64-bit integers.
    U64,
    /// Signed 64-bit integers.
    I64,
    /// Unsigned 32-bit integers.
    U32,
    /// 32-bit floats.
    F32,
    /// Booleans, one bit each.
    Bool,
    /// UTF-8 strings.
    Text,
}

/// A column's name and type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// The column's name.
    pub name: String,
    /// The type of its cells, or of its lists' elements.
    pub kind: CellType,
    /// Whether a cell is a list.
    pub list: bool,
    /// Whether a null is read as 0, which means "missing" of a category.
    zero_if_null: bool,
    /// Whether a cell may be null.
    nullable: bool,
    /// Of masks: the bits that may be set.
    mask_bits: Option<usize>,
}

impl Field {
    /// A column with one value per row.
    pub fn new(name: impl Into<String>, kind: CellType) -> Field {
        let name = name.into();
        Field { name, kind, list: false, zero_if_null: false, nullable: false, mask_bits: None }
    }

    /// A column of [`CellType::F32`], `U32` or `Text` whose cells may be null: in memory NaN,
    /// [`NULL_U32`] and an empty text.
    pub fn nullable(name: impl Into<String>, kind: CellType) -> Field {
        Field { nullable: true, ..Field::new(name, kind) }
    }

    /// A column with a category per row, 0 where it is missing.
    pub fn category(name: impl Into<String>) -> Field {
        Field { zero_if_null: true, ..Field::new(name, CellType::U64) }
    }

    /// The column with masks of so many bits as its cells: in memory [`CellType::U64`], in a file
    /// 32 bits each if they fit. It is read from either, as a schema's actions may have come to
    /// need 64.
    #[must_use]
    pub fn of_masks(self, bits: usize) -> Field {
        Field { kind: CellType::U64, mask_bits: Some(bits), ..self }
    }

    /// The type of its cells in a file that is written.
    fn stored_kind(&self) -> CellType {
        if self.mask_bits.is_some_and(|bits| bits <= 32) { CellType::U32 } else { self.kind }
    }

    /// A column with a list of values per row.
    pub fn list(name: impl Into<String>, kind: CellType) -> Field {
        Field { list: true, ..Field::new(name, kind) }
    }
}

/// A column of one row group.
#[derive(Debug, Clone, PartialEq)]
pub struct Column {
    /// The cells, or the elements of all lists one after the other.
    pub values: ColumnValues,
    /// Where each row's list starts, and at the end the number of elements; `None` for scalars.
    pub offsets: Option<Vec<usize>>,
}

impl Column {
    /// A column with one value per row.
    pub fn scalars<T>(values: impl IntoIterator<Item = T>) -> Column
    where
        ColumnValues: FromIterator<T>,
    {
        Column { values: values.into_iter().collect(), offsets: None }
    }

    /// A column of lists: the elements of all lists, and the length of each.
    pub fn lists<T>(
        values: impl IntoIterator<Item = T>,
        lengths: impl IntoIterator<Item = usize>,
    ) -> Column
    where
        ColumnValues: FromIterator<T>,
    {
        let mut offsets = vec![0];
        for length in lengths {
            offsets.push(offsets[offsets.len() - 1] + length);
        }
        Column { values: values.into_iter().collect(), offsets: Some(offsets) }
    }

    /// A column of a feature, value or truth with one number in all of its rows; of ids 0, of lists
    /// empty ones, and of cells that may be null nothing but nulls.
    pub(crate) fn repeated(field: &Field, number: f32, rows: usize) -> Column {
        let cells = if field.list { 0 } else { rows };
        let values = match field.kind {
            CellType::F32 => ColumnValues::F32(vec![number; cells]),
            CellType::U32 if field.nullable => ColumnValues::U32(vec![NULL_U32; cells]),
            CellType::Text if field.nullable => ColumnValues::Text(vec![String::new(); cells]),
            _ => ColumnValues::U64(vec![0; cells]),
        };
        Column { values, offsets: field.list.then(|| vec![0; rows + 1]) }
    }

    /// The range of `row`'s cell or elements in `values`.
    pub fn range(&self, row: usize) -> Range<usize> {
        self.range_of(row..row + 1)
    }

    /// The range of the cells or elements of `rows` in `values`.
    pub fn range_of(&self, rows: Range<usize>) -> Range<usize> {
        match &self.offsets {
            Some(offsets) => offsets[rows.start]..offsets[rows.end],
            None => rows,
        }
    }
}

/// Defines [`ColumnValues`] with, for each type of cell, its variant, a conversion from an iterator
/// and an accessor.
macro_rules! column_values {
    ($($variant:ident $cell:ty, $accessor:ident;)*) => {
        /// The cells of a column, or the elements of all its lists.
        #[derive(Debug, Clone, PartialEq)]
        pub enum ColumnValues {
            $(
                #[doc = concat!("Cells of `CellType::", stringify!($variant), "`.")]
                $variant(Vec<$cell>),
            )*
        }

        $(
            impl FromIterator<$cell> for ColumnValues {
                fn from_iter<I: IntoIterator<Item = $cell>>(cells: I) -> ColumnValues {
                    ColumnValues::$variant(cells.into_iter().collect())
                }
            }
        )*

        impl Column {
            $(
                #[doc = concat!("The cells of a `CellType::", stringify!($variant), "` column.")]
                ///
                /// # Panics
                /// The column has another type.
                pub fn $accessor(&self) -> &[$cell] {
                    let ColumnValues::$variant(values) = &self.values else {
                        panic!(concat!("not a column of ", stringify!($cell)))
                    };
                    values
                }
            )*
        }
    };
}

column_values! {
    U64 u64, u64s;
    I64 i64, i64s;
    U32 u32, u32s;
    F32 f32, f32s;
    Bool bool, bools;
    Text String, texts;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_null_is_missing_where_something_can_be() {
        use parquet::data_type::{FloatType, Int64Type};
        use parquet::file::writer::SerializedFileWriter;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let message = "message t { optional float price; optional int64 tag; }";
        let schema = parquet::schema::parser::parse_message_type(message).unwrap();
        let file = std::fs::File::create(&path).unwrap();
        let mut writer =
            SerializedFileWriter::new(file, schema.into(), Default::default()).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<FloatType>().write_batch(&[2.5], Some(&[0, 1, 0]), None).unwrap();
        column.close().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&[7, 9], Some(&[1, 0, 1]), None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        let reader = TableReader::open(&path).unwrap();
        let fields = [Field::new("price", CellType::F32), Field::category("tag")];
        let columns = reader.read(0, &fields).unwrap();
        let prices = columns[0].f32s();
        assert!(prices[0].is_nan() && prices[1] == 2.5 && prices[2].is_nan(), "{prices:?}");
        assert_eq!(columns[1].u64s(), [7, 0, 9]);
        let error = reader.read(0, &[Field::new("tag", CellType::U64)]).unwrap_err().to_string();
        assert!(error.contains("`tag` is not U64 in every row"), "an id may not be null: {error}");
    }

    #[test]
    fn cells_that_may_be_null_read_back_and_are_nulls_to_other_tools() {
        use parquet::file::reader::{FileReader, SerializedFileReader};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let kinds = [CellType::F32, CellType::U32, CellType::Text];
        let fields = kinds.map(|kind| Field::nullable(format!("{kind:?}"), kind));
        let groups = [
            [0.5, f32::NAN, -2.0].map(|cell| (cell, cell as u32)),
            [f32::NAN; 3].map(|cell| (cell, 9)),
        ]
        .map(|cells| {
            let of = |cell: f32, known: u32| if cell.is_nan() { NULL_U32 } else { known };
            let text = |cell: f32| if cell.is_nan() { String::new() } else { format!("{cell}") };
            vec![
                Column::scalars(cells.map(|(cell, _)| cell)),
                Column::scalars(cells.map(|(cell, known)| of(cell, known))),
                Column::scalars(cells.map(|(cell, _)| text(cell))),
            ]
        });
        let mut writer = TableWriter::create(&path, fields.to_vec()).unwrap();
        groups.iter().for_each(|group| writer.write(group).unwrap());
        writer.finish().unwrap();
        let reader = TableReader::open(&path).unwrap();
        for (at, group) in groups.iter().enumerate() {
            let read = reader.read(at, &fields).unwrap();
            assert_eq!(format!("{read:?}"), format!("{group:?}"), "NaN is no equal of itself");
        }
        let file = SerializedFileReader::new(std::fs::File::open(&path).unwrap()).unwrap();
        for column in 0..3 {
            let nulls = |group: usize| {
                let statistics = file.metadata().row_group(group).column(column).statistics();
                statistics.unwrap().null_count_opt()
            };
            assert_eq!([nulls(0), nulls(1)], [Some(1), Some(3)]);
        }
        let strict = reader.read(0, &[Field::new("U32", CellType::U32)]).unwrap_err().to_string();
        assert!(strict.contains("`U32` is not U32 in every row"), "{strict}");
    }

    #[test]
    fn masks_of_few_bits_are_stored_as_before_and_read_as_those_of_many() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let fields = |bits: usize| {
            let list = Field::list("history", CellType::U64);
            [Field::new("actions", CellType::U64), list].map(|field| field.of_masks(bits))
        };
        let written = |bits: usize, mask: u64| {
            let columns = vec![Column::scalars([1, mask]), Column::lists([mask, 0, 3], [0, 3])];
            let mut writer = TableWriter::create(&path, fields(bits).to_vec()).unwrap();
            writer.write(&columns).unwrap();
            writer.finish().unwrap();
            for bits in [bits, 64] {
                let reader = TableReader::open(&path).unwrap();
                assert_eq!(reader.read(0, &fields(bits)).unwrap(), columns);
            }
            TableReader::open(&path).unwrap()
        };
        let stored = |kind| [Field::new("actions", kind), Field::list("history", kind)];
        let few = written(32, 1 << 31);
        assert_eq!(few.read(0, &stored(CellType::U32)).unwrap()[0].u32s(), [1, 1 << 31]);
        let many = written(33, 1 << 32 | 1 << 31);
        assert_eq!(many.read(0, &stored(CellType::U64)).unwrap()[0].u64s()[1], 1 << 32 | 1 << 31);
        assert!(many.read(0, &stored(CellType::U32)).is_err(), "another type");
        assert!(few.read(0, &stored(CellType::U64)).is_err(), "an id of 32 bits is none");
    }

    #[test]
    fn tables_read_back_bit_for_bit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.parquet");
        let fields = vec![
            Field::new("id", CellType::U64),
            Field::new("name", CellType::Text),
            Field::new("flag", CellType::Bool),
            Field::list("tae", CellType::F32),
            Field::list("when", CellType::I64),
        ];
        let group = |shift: u64| {
            vec![
                Column::scalars([u64::MAX - shift, shift, 7]),
                Column::scalars(["é", "", "x"].map(String::from)),
                Column::scalars([true, false, true]),
                Column::lists([0.1_f32, f32::NEG_INFINITY, -0.0], [0, 3, 0]),
                Column::lists([-1_i64, 2], [1, 0, 1]),
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
        let message = reader.read(0, &[Field::new("age", CellType::U64)]).unwrap_err().to_string();
        assert!(message.contains("t.parquet") && message.contains("`age`"), "{message}");
        let message = reader.read(0, &[Field::new("tae", CellType::F32)]).unwrap_err().to_string();
        assert!(message.contains("`tae` is not F32"), "{message}");
    }
}
