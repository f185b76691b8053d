//! A description with a name of one megabyte.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Description;

hostile_mutant! {
    fn describe(description: &mut Description) {
        description.name = description.name.repeat(100_000);
    }
}
