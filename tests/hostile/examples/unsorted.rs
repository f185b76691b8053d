//! `rank` returns scores that are not sorted. This is valid: the order of the list counts, and a
//! diversity rule may put a lower score first.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let score = |candidate: usize| ((candidate * 7919) % 13) as f32 - 6.0;
        let ranked = |candidate| Ranked::new(candidate as u32, score(candidate));
        Ok((0..request.limit).map(ranked).collect())
    }
}
