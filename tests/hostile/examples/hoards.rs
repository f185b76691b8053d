//! A network whose operators take no FLOPs and hold a gigabyte for each request.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct Hoards;

impl Expert for Hoards {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("hoards", info).history_len(4096)
    }

    fn network(g: &Graph) {
        let wide = g.concat(&[g.history_age(); 256]);
        let wider = g.concat(&[wide; 256]);
        let past = wider.slice(0, 1).pool_sum();
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(past));
        }
    }
}

hypercast_sdk::export!(Hoards);
