//! A description that wants more history than there is.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Description};

struct LongHistory;

impl Mutation for LongHistory {
    const NAME: &'static str = "long_history";

    fn describe(description: &mut Description) {
        description.history_len = u32::MAX;
    }
}

type Component = Mutant<LongHistory>;
raw::export_expert_world!(Component with_types_in raw);
