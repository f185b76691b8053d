//! `rank` returns more candidates than the caller wants back, and more than there are.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct WrongLength;

impl Expert for WrongLength {
    fn describe(info: &HostInfo) -> Description {
        good::describe("wrong_length", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let ranked = |candidate| Ranked { candidate, score: 0.0 };
        Ok((0..request.candidates.len() as u32 + 1).map(ranked).collect())
    }
}

hypercast_sdk::export!(WrongLength);
