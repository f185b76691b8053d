//! A network with a node that reads itself.

use hypercast_hostile::{hostile_mutant, node};
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(network: &mut Network) {
        let itself = network.nodes.len() as u32;
        network.nodes.push(node("Add", &[network.outputs[0].node, itself]));
        network.outputs[0].node = itself;
    }
}
