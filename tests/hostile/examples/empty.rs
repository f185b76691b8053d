//! `rank` returns no candidate.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Empty;

impl Expert for Empty {
    fn describe(info: &HostInfo) -> Description {
        good::describe("empty", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(Vec::new())
    }
}

hypercast_sdk::export!(Empty);
