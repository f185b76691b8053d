//! `rank` returns scores in no order. Its order counts, not its scores: a rule for diversity may well put a lower
//! score first.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Unsorted;

impl Expert for Unsorted {
    fn describe(info: &HostInfo) -> Description {
        good::describe("unsorted", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let score = |candidate: usize| ((candidate * 7919) % 13) as f32 - 6.0;
        let ranked = |candidate| Ranked { candidate: candidate as u32, score: score(candidate) };
        Ok((0..request.limit).map(ranked).collect())
    }
}

hypercast_sdk::export!(Unsorted);
