//! `rank` returns millions of candidates.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked::new(0, 1.0); 2_000_000])
    }
}
