//! A description that wants a column which no schema has.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{
    self,
    types::{Column, Description},
};

struct ForeignColumn;

impl Mutation for ForeignColumn {
    const NAME: &'static str = "foreign_column";

    fn describe(description: &mut Description) {
        description.columns.push(Column::Feature("no_such_feature".into()));
    }
}

type Component = Mutant<ForeignColumn>;
raw::export_expert_world!(Component with_types_in raw);
