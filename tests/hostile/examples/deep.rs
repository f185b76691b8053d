//! A network of many thousand nodes.

use hypercast_hostile::{hostile_mutant, node};
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(network: &mut Network) {
        for _ in 0..20_000 {
            let last = network.nodes.len() as u32 - 1;
            network.nodes.push(node("Sigmoid", &[last]));
        }
    }
}
