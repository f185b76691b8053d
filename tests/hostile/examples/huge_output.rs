//! `rank` returns millions of candidates.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct HugeOutput;

impl Expert for HugeOutput {
    fn describe(info: &HostInfo) -> Description {
        good::describe("huge_output", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked { candidate: 0, score: 1.0 }; 4_000_000])
    }
}

hypercast_sdk::export!(HugeOutput);
