//! `describe` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo};

struct SpinDescribe;

impl Expert for SpinDescribe {
    fn describe(_info: &HostInfo) -> Description {
        loop {
            std::hint::black_box(());
        }
    }

    fn network(g: &Graph) {
        good::network(g);
    }
}

hypercast_sdk::export!(SpinDescribe);
