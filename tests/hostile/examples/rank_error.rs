//! `rank` returns an error.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct RankError;

impl Expert for RankError {
    fn describe(info: &HostInfo) -> Description {
        good::describe("rank_error", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Err("as this guest is meant to".into())
    }
}

hypercast_sdk::export!(RankError);
