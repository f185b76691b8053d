//! `evaluate` never returns.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Evaluation, HostInfo, Verdict};

hostile_expert! {
    fn evaluate(_info: &HostInfo, _evaluation: &Evaluation) -> Verdict {
        loop {
            std::hint::black_box(());
        }
    }
}
