//! `rank` returns an error of twenty megabytes.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Err("x".repeat(20 << 20))
    }
}
