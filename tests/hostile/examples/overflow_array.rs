//! `rank` recurses with large local values, which are in the guest's own memory.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.top(&[descend(request.limit as u64) as f32]))
    }
}

#[expect(unconditional_recursion, reason = "the fault that this guest is for")]
fn descend(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 4096]);
    descend(depth + 1) + frame[3]
}
