//! `rank` is quick until a request has more than 15 candidates, and then slow, but right: no fault, and still nothing that
//! users should wait for.

use std::hint::black_box;

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

/// Some tens of milliseconds.
const STEPS: u64 = 100_000_000;

struct Plods;

impl Expert for Plods {
    fn describe(info: &HostInfo) -> Description {
        good::describe("plods", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        if request.candidates.len() > 15 {
            (0..STEPS).for_each(|step| {
                black_box(step);
            });
        }
        <good::Good as Expert>::rank(request)
    }
}

hypercast_sdk::export!(Plods);
