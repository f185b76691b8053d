//! A description that requests a longer history than the host offers.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Description;

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.history_len = u32::MAX;
    }
}
