//! The network of `complete` without its cross network. This is valid.

use hypercast_sdk::{Description, Expert, ExpertFusion, Graph, HostInfo};

struct WithoutCross;

impl Expert for WithoutCross {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info).history_len(32)
    }

    fn network(g: &Graph) {
        hypercast_hostile::complete_network(g, ExpertFusion::mlp("expert", [64, 32]));
    }
}

hypercast_sdk::export!(WithoutCross);
