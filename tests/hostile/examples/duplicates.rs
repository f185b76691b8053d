//! `rank` returns one candidate many times.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Duplicates;

impl Expert for Duplicates {
    fn describe(info: &HostInfo) -> Description {
        good::describe("duplicates", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked { candidate: 0, score: 1.0 }; request.limit.max(2)])
    }
}

hypercast_sdk::export!(Duplicates);
