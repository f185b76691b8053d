//! `rank` behaves until a request has more than 15 candidates, and then traps: a fault that a version's first requests
//! need not show.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Crowd;

impl Expert for Crowd {
    fn describe(info: &HostInfo) -> Description {
        good::describe("crowd", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        assert!(
            request.candidates.len() <= 15,
            "there are too many, as this guest is meant to say"
        );
        <good::Good as Expert>::rank(request)
    }
}

hypercast_sdk::export!(Crowd);
