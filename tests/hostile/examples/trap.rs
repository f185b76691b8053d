//! `rank` panics, which traps in Wasm.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    // A frame of its own in backtraces, whatever the optimiser does.
    #[inline(never)]
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        panic!("intended panic with {} candidates", request.candidates.len())
    }
}
