//! Public data sets: mappings that we ship, and what these cannot say.

pub mod kuairand;
pub mod movielens;
mod wheel;

use hypercast_core::progress::Progress;

use crate::ImportReport;
use crate::cell::Cell;
use crate::error::Result;
use crate::input::{InputFile, Reading, Row};

/// Calls `add` with each row of files, before an import that reports those which it cannot use.
fn look_at(files: &[InputFile], columns: &[&str], mut add: impl FnMut(&dyn Row)) -> Result<()> {
    let columns: Vec<String> = columns.iter().map(|column| column.to_string()).collect();
    let (mut report, mut progress) = (ImportReport::default(), Progress::start("look at files", 0));
    files.iter().try_for_each(|file| {
        file.read(&mut Reading::new(&columns, &mut report, &mut progress), |row| {
            add(row);
            Ok(())
        })
    })
}

/// What was computed, or a cell that says why it could not be.
type Computed<T = Cell<'static>> = std::result::Result<T, Cell<'static>>;

/// The number of a cell that has to hold one.
fn number(cell: &Cell<'_>) -> Computed<f64> {
    match cell.number() {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(wrong("a cell that it is computed from is missing")),
        Err(reason) => Err(Cell::Wrong(reason)),
    }
}

fn wrong(reason: impl Into<String>) -> Cell<'static> {
    Cell::Wrong(reason.into())
}

/// The cell of a column that was computed, whether that failed or not.
fn cell(computed: Computed) -> Cell<'static> {
    computed.unwrap_or_else(|wrong| wrong)
}

/// A number as it is in 32 bits, as all features and values are.
fn float(number: f32) -> Cell<'static> {
    Cell::Float(number)
}
