//! `rank` writes a thousand long log lines, then ranks correctly.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let line = "flood ".repeat(1_000);
        for _ in 0..1_000 {
            hypercast_sdk::log::error(&line);
        }
        let first = request.predictions().first().ok_or("no prediction")?;
        Ok(request.top(&first.values))
    }
}
