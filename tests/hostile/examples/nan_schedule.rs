//! `schedule` returns NaN.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::TrainingStep;

hostile_expert! {
    fn schedule(_step: &TrainingStep) -> f32 {
        f32::NAN
    }
}
