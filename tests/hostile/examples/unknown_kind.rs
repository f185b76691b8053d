//! A description with a column of a kind that no host knows yet.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::{Column, Description};

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.columns.push(Column { kind: "hologram".into(), name: "content".into() });
    }
}
