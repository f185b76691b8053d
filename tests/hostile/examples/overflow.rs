//! `rank` recurses without end.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Overflow;

impl Expert for Overflow {
    fn describe(info: &HostInfo) -> Description {
        good::describe("overflow", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&[descend(request.limit as u64) as f32]))
    }
}

hypercast_sdk::export!(Overflow);

#[expect(unconditional_recursion, reason = "the fault that this guest is for")]
fn descend(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 16]);
    descend(depth + 1) + frame[3]
}
