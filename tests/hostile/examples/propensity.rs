//! `rank` returns a propensity above 1.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let ranked = |at| Ranked { propensity: Some(1.5), ..Ranked::new(at, 0.0) };
        Ok((0..request.limit as u32).map(ranked).collect())
    }
}
