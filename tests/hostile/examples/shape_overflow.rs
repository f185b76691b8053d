//! A parameter whose size no integer can hold.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Network};

struct ShapeOverflow;

impl Mutation for ShapeOverflow {
    const NAME: &'static str = "shape_overflow";

    fn mutate(network: &mut Network) {
        network.parameters[0].shape = vec![u32::MAX; 3];
    }
}

type Component = Mutant<ShapeOverflow>;
raw::export_expert_world!(Component with_types_in raw);
