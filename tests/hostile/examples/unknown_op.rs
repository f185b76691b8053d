//! An op that the contract does not have.

use hypercast_hostile::{Mutant, Mutation, node};
use hypercast_sdk::raw::{self, types::Network};

struct UnknownOp;

impl Mutation for UnknownOp {
    const NAME: &'static str = "unknown_op";

    fn mutate(network: &mut Network) {
        let output = &mut network.outputs[0];
        network.nodes.push(node("ReadFile", &[output.node]));
        output.node = network.nodes.len() as u32 - 1;
    }
}

type Component = Mutant<UnknownOp>;
raw::export_expert_world!(Component with_types_in raw);
