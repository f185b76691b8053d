//! `rank` writes more log lines than anybody reads, and long ones, then ranks as it should.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, Ranked, Request};

struct LogFlood;

impl Expert for LogFlood {
    fn describe(info: &HostInfo) -> Description {
        good::describe("log_flood", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let line = "flood ".repeat(1_000);
        for _ in 0..1_000 {
            hypercast_sdk::log::error(&line);
        }
        let first = request.predictions().first().ok_or("no prediction")?;
        Ok(request.top(&first.values))
    }
}

hypercast_sdk::export!(LogFlood);
