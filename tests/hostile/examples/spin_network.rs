//! `network` never returns.

use hypercast_hostile::{Mutant, Mutation};
use hypercast_sdk::raw::{self, types::Network};

struct SpinNetwork;

impl Mutation for SpinNetwork {
    const NAME: &'static str = "spin_network";

    fn mutate(_network: &mut Network) {
        loop {
            std::hint::black_box(());
        }
    }
}

type Component = Mutant<SpinNetwork>;
raw::export_expert_world!(Component with_types_in raw);
