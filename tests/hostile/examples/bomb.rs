//! `rank` takes memory until there is none.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Bomb;

impl Expert for Bomb {
    fn describe(info: &HostInfo) -> Description {
        good::describe("bomb", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        let mut held = Vec::new();
        loop {
            held.push(std::hint::black_box(vec![1u8; 1 << 20]));
        }
    }
}

hypercast_sdk::export!(Bomb);
