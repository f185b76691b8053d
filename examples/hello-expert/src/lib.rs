//! The smallest expert: one linear layer per task on the FM's target-aware embedding.
//!
//! Build it with `cargo run -p cargo-hypercast -- build -p hello-expert`.
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear};

struct Hello;
impl Expert for Hello {
    fn describe(info: &HostInfo) -> Description {
        Description::new("hello", "1.0.0").all_tasks(info)
    }
    fn network(g: &Graph) {
        for task in g.tasks() {
            g.output(&task.name, Linear::new(&task.name, 1).apply(g.tae()));
        }
    }
}
hypercast_sdk::export!(Hello);
