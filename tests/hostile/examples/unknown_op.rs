//! A network with an op that is not in the contract.

use hypercast_hostile::{hostile_mutant, node};
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(network: &mut Network) {
        let output = &mut network.outputs[0];
        network.nodes.push(node("ReadFile", &[output.node]));
        output.node = network.nodes.len() as u32 - 1;
    }
}
