//! `rank` returns more than a million candidates, which fit into a memory of 64 MiB and are more
//! than what a host takes.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked::new(0, 1.0); 1_300_000])
    }
}
