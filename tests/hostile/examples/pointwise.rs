//! Each row is learned alone, by the host's own loss. This is valid: it is what `listwise` is
//! compared with.

use hypercast_sdk::{Description, Expert, Graph, HostInfo};

struct Pointwise;

impl Expert for Pointwise {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info)
    }

    fn network(g: &Graph) {
        hypercast_hostile::ranking_network(g, |_, _| ());
    }
}

hypercast_sdk::export!(Pointwise);
