//! `network` never returns.

use hypercast_hostile::hostile_mutant;
use hypercast_sdk::raw::types::Network;

hostile_mutant! {
    fn mutate(_network: &mut Network) {
        loop {
            std::hint::black_box(());
        }
    }
}
