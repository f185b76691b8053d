//! `rank` returns scores that are no numbers.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Nan;

impl Expert for Nan {
    fn describe(info: &HostInfo) -> Description {
        good::describe("nan", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let ranked = |candidate| Ranked { candidate, score: f32::NAN };
        Ok((0..request.limit as u32).map(ranked).collect())
    }
}

hypercast_sdk::export!(Nan);
