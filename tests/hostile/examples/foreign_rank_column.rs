//! A description that requests ids of the history for `rank`, which is not allowed.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::{Column, Description};

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.rank_columns.push(Column::history_id("item_id"));
    }
}
