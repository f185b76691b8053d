//! A node that reads itself.

use hypercast_hostile::{Mutant, Mutation, node};
use hypercast_sdk::raw::{self, types::Network};

struct Cycle;

impl Mutation for Cycle {
    const NAME: &'static str = "cycle";

    fn mutate(network: &mut Network) {
        let itself = network.nodes.len() as u32;
        network.nodes.push(node("Add", &[network.outputs[0].node, itself]));
        network.outputs[0].node = itself;
    }
}

type Component = Mutant<Cycle>;
raw::export_expert_world!(Component with_types_in raw);
