//! A description that lists each task twice.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Description;

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.tasks.extend(description.tasks.clone());
    }
}
