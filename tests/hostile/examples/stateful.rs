//! `rank` wants to answer each call otherwise than the last: it counts them. Every call meets a fresh instance, so
//! all are alike.

use std::sync::atomic::{AtomicU32, Ordering};

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Stateful;

static CALLS: AtomicU32 = AtomicU32::new(0);

impl Expert for Stateful {
    fn describe(info: &HostInfo) -> Description {
        good::describe("stateful", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let rows = request.limit as u32;
        let ranked = |at: u32| Ranked { candidate: (at + call) % rows, score: call as f32 };
        Ok((0..rows).map(ranked).collect())
    }
}

hypercast_sdk::export!(Stateful);
