//! One of twenty rankings is by chance. It is not hostile.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        Ok(request.epsilon_greedy(&request.weighted_sum(|_| 1.0), 0.05))
    }
}
