//! A network within the limit of parameters that exceeds the limit of FLOPs.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct Flops;

impl Expert for Flops {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("flops", info)
    }

    fn network(g: &Graph) {
        let mut last = Linear::new("first", 1024).apply(g.features(&g.info().features));
        for at in 0..40 {
            last = Linear::new(&format!("layer{at}"), 1024).apply(last);
        }
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(last));
        }
    }
}

hypercast_sdk::export!(Flops);
