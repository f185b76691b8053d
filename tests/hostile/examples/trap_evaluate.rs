//! `evaluate` panics, which traps in Wasm.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Evaluation, HostInfo, Verdict};

hostile_expert! {
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        panic!("intended panic with {} slices", evaluation.slices.len())
    }
}
