//! `rank` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct Spin;

impl Expert for Spin {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(Spin);
