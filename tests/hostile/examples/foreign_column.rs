//! A description with a column that no schema has.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::{Column, Description};

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.columns.push(Column::feature("no_such_feature"));
    }
}
