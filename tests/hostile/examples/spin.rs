//! `rank` never returns to its caller.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    // A frame of its own in backtraces, whatever the optimiser does.
    #[inline(never)]
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}
