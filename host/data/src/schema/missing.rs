//! Features that are missing: what stands for one, and the columns that say so.
//!
//! A dense feature that is missing is [`MISSING`] where it is read. If the schema declares it
//! optional, it stays so to where a model standardises it, and there counts as the column's mean;
//! a second column says whether it is missing, so that models learn from that as from any other
//! number. If not, examples have 0 for it: schemas without the declaration mean what they meant to
//! earlier releases, and so do models that were trained under them. A category that is missing is
//! 0, and has a row of its own among the embeddings. A feature of several values that has none has
//! no row; its embedding is zeros.

use super::{FeatureKind, Schema};

/// What a dense feature is where it is missing.
pub const MISSING: f32 = f32::NAN;

/// The columns `NAME_missing` of `Target::features`, which come last in it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MissingColumns {
    /// The columns of the optional features, in the order of those that say whether they are
    /// missing.
    optional: Vec<usize>,
    /// The columns of the other dense features.
    others: Vec<usize>,
}

impl MissingColumns {
    /// Those of a schema's features.
    pub fn new(schema: &Schema) -> MissingColumns {
        let dense = schema.features().filter(|feature| feature.kind == FeatureKind::Dense);
        let (optional, others): (Vec<_>, Vec<_>) =
            dense.enumerate().partition(|(_, feature)| feature.is_optional());
        let columns = |of: Vec<(usize, _)>| of.into_iter().map(|(column, _)| column).collect();
        MissingColumns { optional: columns(optional), others: columns(others) }
    }

    /// The columns of the optional features.
    pub fn optional(&self) -> &[usize] {
        &self.optional
    }

    /// Appends the columns to a row that has all others.
    pub(crate) fn append(&self, row: &mut Vec<f32>) {
        row.resize(row.len() + self.optional.len(), 0.0);
        self.fill(row);
    }

    /// Sets the columns of a row whose other columns were set, and what is missing of features that
    /// are not optional to 0.
    ///
    /// # Panics
    /// The row has fewer columns than the schema.
    pub fn fill(&self, row: &mut [f32]) {
        let first = row.len() - self.optional.len();
        for (at, &column) in self.optional.iter().enumerate() {
            row[first + at] = f32::from(u8::from(!row[column].is_finite()));
        }
        for &column in &self.others {
            if !row[column].is_finite() {
                row[column] = 0.0;
            }
        }
    }
}
