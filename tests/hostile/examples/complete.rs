//! An expert of everything that the paper has and this host offers, with a cross network in
//! parallel with its MLP. This is valid: it is what `hypercast-lab experiment ablation` takes parts
//! away from.

use hypercast_sdk::{Cross, Description, Expert, ExpertFusion, Graph, HostInfo};

struct Complete;

impl Expert for Complete {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe(env!("CARGO_CRATE_NAME"), info).history_len(32)
    }

    fn network(g: &Graph) {
        let cross = Cross::new("cross", 2).rank(16);
        hypercast_hostile::complete_network(g, ExpertFusion::cross("expert", [64, 32], cross));
    }
}

hypercast_sdk::export!(Complete);
