//! `describe` never returns.

use hypercast_sdk::{Description, Expert, Graph, HostInfo};

struct SpinDescribe;

impl Expert for SpinDescribe {
    fn describe(_info: &HostInfo) -> Description {
        loop {
            std::hint::black_box(());
        }
    }

    fn network(g: &Graph) {
        hypercast_hostile::network(g);
    }
}

hypercast_sdk::export!(SpinDescribe);
