//! `rank` allocates memory without end.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    // A frame of its own in backtraces, whatever the optimiser does.
    #[inline(never)]
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        let mut held = Vec::new();
        loop {
            held.push(std::hint::black_box(vec![1u8; 1 << 20]));
        }
    }
}
