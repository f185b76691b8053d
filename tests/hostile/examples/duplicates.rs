//! `rank` returns the same candidate many times.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked::new(0, 1.0); request.limit.max(2)])
    }
}
