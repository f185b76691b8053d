//! `rank` returns no candidates.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(Vec::new())
    }
}
