//! A parameter whose shape does not fit the ops that use it.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(network: &mut Network) {
        network.parameters[0].shape = vec![3, 7];
    }
}
