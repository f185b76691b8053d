//! `rank` returns NaN scores.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let ranked = |candidate| Ranked::new(candidate, f32::NAN);
        Ok((0..request.limit as u32).map(ranked).collect())
    }
}
