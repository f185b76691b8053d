//! Numbers that nobody outside can guess, for keys of maps and names of chains. A simulated host
//! gives its own, so that a run repeats.

use std::hash::{BuildHasher as _, RandomState};

use crate::simulated;

/// The next number, of 64 random bits.
pub fn number() -> u64 {
    match simulated::host() {
        None => RandomState::new().hash_one(0_u64),
        Some(host) => host.number(),
    }
}
