//! `rank` returns a candidate that the request does not have.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct OutOfRange;

impl Expert for OutOfRange {
    fn describe(info: &HostInfo) -> Description {
        good::describe("out_of_range", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked { candidate: request.candidates.len() as u32, score: 1.0 }])
    }
}

hypercast_sdk::export!(OutOfRange);
