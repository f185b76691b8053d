//! A parameter whose number of values overflows an integer.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(network: &mut Network) {
        network.parameters[0].shape = vec![u32::MAX; 3];
    }
}
