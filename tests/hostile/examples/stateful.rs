//! `rank` counts its calls and gives each one another answer. Since each call runs in a fresh
//! instance, all answers are the same.

use std::sync::atomic::{AtomicU32, Ordering};

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

static CALLS: AtomicU32 = AtomicU32::new(0);

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let call = CALLS.fetch_add(1, Ordering::Relaxed);
        let rows = request.limit as u32;
        let ranked = |at: u32| Ranked::new((at + call) % rows, call as f32);
        Ok((0..rows).map(ranked).collect())
    }
}
