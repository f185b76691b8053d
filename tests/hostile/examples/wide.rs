//! A layer as wide as a small table.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct Wide;

impl Expert for Wide {
    fn describe(info: &HostInfo) -> Description {
        good::describe("wide", info)
    }

    fn network(g: &Graph) {
        let wide = Linear::new("wide", 1 << 18).apply(g.features(&g.info().features[..1]));
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(wide));
        }
    }
}

hypercast_sdk::export!(Wide);
