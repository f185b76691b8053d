//! A description whose `rank` wants the ids of histories, which it may not read.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{
    self,
    types::{Column, Description},
};

struct ForeignRankColumn;

impl Mutation for ForeignRankColumn {
    const NAME: &'static str = "foreign_rank_column";

    fn describe(description: &mut Description) {
        description.rank_columns.push(Column::HistoryId("item_id".into()));
    }
}

type Component = Mutant<ForeignRankColumn>;
raw::export_expert_world!(Component with_types_in raw);
