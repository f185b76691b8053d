//! A network with a layer as wide as an embedding table.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct Wide;

impl Expert for Wide {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("wide", info)
    }

    fn network(g: &Graph) {
        let wide = Linear::new("wide", 1 << 18).apply(g.features(&g.info().features[..1]));
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(wide));
        }
    }
}

hypercast_sdk::export!(Wide);
