//! A description that asks for weeks and for all memory, and a `rank` that uses what it gets.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Greedy;

impl Expert for Greedy {
    fn describe(info: &HostInfo) -> Description {
        good::describe("greedy", info).deadline_ms(u32::MAX).memory_mib(u32::MAX)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(Greedy);
