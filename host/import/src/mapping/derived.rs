//! Columns that a preset computes from others of the same row: what a mapping cannot say.

use super::source::ColumnList;
use crate::cell::Cell;
use crate::error::Result;
use crate::input::{InputFile, Reading, Row};
use crate::report::RowFailure;

/// Computes a cell from others of its row.
type ComputeCell<'a> = dyn Fn(&[Cell<'_>]) -> Cell<'static> + 'a;

/// A column that no file has.
pub(crate) struct DerivedColumn<'a> {
    pub(crate) name: &'static str,
    /// The columns of the file that it is computed from.
    pub(crate) from: &'static [&'static str],
    pub(crate) compute: Box<ComputeCell<'a>>,
}

impl<'a> DerivedColumn<'a> {
    pub(crate) fn new(
        name: &'static str,
        from: &'static [&'static str],
        compute: impl Fn(&[Cell<'_>]) -> Cell<'static> + 'a,
    ) -> DerivedColumn<'a> {
        DerivedColumn { name, from, compute: Box::new(compute) }
    }
}

/// Where each column that a mapping names comes from.
pub(super) struct ColumnPlaces<'a> {
    /// The columns to read of the files.
    read: ColumnList,
    places: Vec<ColumnPlace<'a>>,
}

enum ColumnPlace<'a> {
    Read(usize),
    Derived(&'a DerivedColumn<'a>, Vec<usize>),
}

/// A row with its derived columns.
struct DerivedRow<'r> {
    row: &'r dyn Row,
    places: &'r [ColumnPlace<'r>],
}

impl Row for DerivedRow<'_> {
    fn cell(&self, column: usize) -> Cell<'_> {
        match &self.places[column] {
            ColumnPlace::Read(at) => self.row.cell(*at),
            ColumnPlace::Derived(derived, from) => {
                let cells: Vec<Cell<'_>> = from.iter().map(|&at| self.row.cell(at)).collect();
                (derived.compute)(&cells)
            }
        }
    }
}

impl<'a> ColumnPlaces<'a> {
    /// The places of the columns `wanted`.
    pub(super) fn new(wanted: &ColumnList, derived: &'a [DerivedColumn<'a>]) -> ColumnPlaces<'a> {
        let mut read = ColumnList::default();
        let mut places = Vec::new();
        for name in &wanted.names {
            places.push(match derived.iter().find(|derived| derived.name == name) {
                None => ColumnPlace::Read(read.place(name)),
                Some(derived) => {
                    let from = derived.from.iter().map(|name| read.place(name)).collect();
                    ColumnPlace::Derived(derived, from)
                }
            });
        }
        ColumnPlaces { read, places }
    }

    /// Calls `add` with each row of a file; its cells are at the places of the columns wanted.
    ///
    /// # Errors
    /// As those of [`InputFile::read`].
    pub(super) fn read_file(
        &self,
        file: &InputFile,
        reading: &mut Reading<'_>,
        mut add: impl FnMut(&dyn Row) -> std::result::Result<(), RowFailure>,
    ) -> Result<()> {
        let is_plain = self.places.iter().all(|place| matches!(place, ColumnPlace::Read(_)));
        let mut reading = reading.of_columns(&self.read.names);
        if is_plain {
            // Then the columns read are those wanted, in their order.
            return file.read(&mut reading, add);
        }
        file.read(&mut reading, |row| add(&DerivedRow { row, places: &self.places }))
    }
}
