//! `rank` panics, which traps in Wasm.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        panic!("intended panic with {} candidates", request.candidates.len())
    }
}
