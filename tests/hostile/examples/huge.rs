//! A network with 10^9 parameters.

use hypercast_sdk::{Description, Embedding, Expert, Graph, HostInfo, Linear};

struct Huge;

impl Expert for Huge {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("huge", info)
    }

    fn network(g: &Graph) {
        let item = Embedding::new("item", 100_000_000, 10).apply(g.id("item_id"));
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(item));
        }
    }
}

hypercast_sdk::export!(Huge);
