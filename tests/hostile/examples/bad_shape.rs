//! A parameter's shape does not fit where it is used.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Network};

struct BadShape;

impl Mutation for BadShape {
    const NAME: &'static str = "bad_shape";

    fn mutate(network: &mut Network) {
        network.parameters[0].shape = vec![3, 7];
    }
}

type Component = Mutant<BadShape>;
raw::export_expert_world!(Component with_types_in raw);
