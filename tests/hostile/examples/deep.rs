//! A network of a many thousand nodes.

use hypercast_hostile::{Mutant, Mutation, node};
use hypercast_sdk::raw::{self, types::Network};

struct Deep;

impl Mutation for Deep {
    const NAME: &'static str = "deep";

    fn mutate(network: &mut Network) {
        for _ in 0..20_000 {
            let last = network.nodes.len() as u32 - 1;
            network.nodes.push(node("Sigmoid", &[last]));
        }
    }
}

type Component = Mutant<Deep>;
raw::export_expert_world!(Component with_types_in raw);
