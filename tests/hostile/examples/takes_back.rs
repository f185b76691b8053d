//! `evaluate` publishes the first parameters and rolls back all later ones.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{Evaluation, HostInfo, Verdict};

hostile_expert! {
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        if evaluation.slices.iter().any(|slice| slice.serving.is_some()) {
            Verdict::RollBack("takes_back never wants anything new".into())
        } else {
            Verdict::Publish
        }
    }
}
