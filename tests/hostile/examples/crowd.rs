//! `rank` works for up to 15 candidates and traps with more: a fault that the first requests of a
//! version may not show.

use hypercast_hostile::{ValidExpert, hostile_expert};
use hypercast_sdk::{Expert, Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        assert!(
            request.candidates.len() <= 15,
            "intended panic: too many candidates"
        );
        <ValidExpert as Expert>::rank(request)
    }
}
