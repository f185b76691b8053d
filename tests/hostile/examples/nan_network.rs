//! A valid network whose predictions are all 0 / 0.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct NanNetwork;

impl Expert for NanNetwork {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("nan_network", info)
    }

    fn network(g: &Graph) {
        let input = if g.info().tae_dim > 0 { g.tae() } else { g.features(&g.info().features) };
        for task in g.tasks() {
            let zero = Linear::new(&task.name, 1).apply(input) * 0.0;
            g.output(&task.name, zero / -zero);
        }
    }
}

hypercast_sdk::export!(NanNetwork);
