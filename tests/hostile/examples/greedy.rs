//! A description that requests a deadline of weeks and all memory, and a `rank` that never returns.

use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Greedy;

impl Expert for Greedy {
    fn describe(info: &HostInfo) -> Description {
        hypercast_hostile::describe("greedy", info).deadline_ms(u32::MAX).memory_mib(u32::MAX)
    }

    fn network(g: &Graph) {
        hypercast_hostile::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(Greedy);
