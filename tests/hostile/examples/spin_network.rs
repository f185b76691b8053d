//! `network` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo};

struct SpinNetwork;

impl Expert for SpinNetwork {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin_network", info)
    }

    fn network(_g: &Graph) {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(SpinNetwork);
