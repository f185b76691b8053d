//! `rank` returns more candidates than requested, and more than the request has.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let ranked = |candidate| Ranked::new(candidate, 0.0);
        Ok((0..request.candidates.len() as u32 + 1).map(ranked).collect())
    }
}
