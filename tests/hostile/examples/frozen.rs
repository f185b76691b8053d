//! `schedule` returns 0 for every step. This is valid; a test uses it to see that the factor is
//! applied.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::TrainingStep;

hostile_expert! {
    fn schedule(_step: &TrainingStep) -> f32 {
        0.0
    }
}
