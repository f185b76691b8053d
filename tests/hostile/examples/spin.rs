//! `rank` never returns.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Ranked, Request};

hostile_expert! {
    fn rank(_request: &Request) -> Result<Vec<Ranked>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}
