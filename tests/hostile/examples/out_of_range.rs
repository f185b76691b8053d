//! `rank` returns an index beyond the candidates.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(vec![Ranked::new(request.candidates.len() as u32, 1.0)])
    }
}
