//! `rank` is fast for up to 15 candidates and slow with more. Its results are correct, so there is
//! no fault, but users should not have to wait for it.

use std::hint::black_box;

use hypercast_hostile::{ValidExpert, hostile_expert};
use hypercast_sdk::{Expert, Ranked, Request};

/// Takes some tens of milliseconds.
const STEPS: u64 = 100_000_000;

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        if request.candidates.len() > 15 {
            (0..STEPS).for_each(|step| {
                black_box(step);
            });
        }
        <ValidExpert as Expert>::rank(request)
    }
}
