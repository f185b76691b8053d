//! A description with a name of a megabyte.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Description};

struct LongName;

impl Mutation for LongName {
    const NAME: &'static str = "long_name";

    fn describe(description: &mut Description) {
        description.name = description.name.repeat(100_000);
    }
}

type Component = Mutant<LongName>;
raw::export_expert_world!(Component with_types_in raw);
