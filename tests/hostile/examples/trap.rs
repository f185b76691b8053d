//! `rank` panics, which is a Wasm trap.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Trap;

impl Expert for Trap {
    fn describe(info: &HostInfo) -> Description {
        good::describe("trap", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        panic!("as this guest is meant to, with {} candidates", request.candidates.len())
    }
}

hypercast_sdk::export!(Trap);
