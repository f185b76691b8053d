//! `schedule` returns a factor that is no number.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, TrainingStep};

struct NanSchedule;

impl Expert for NanSchedule {
    fn describe(info: &HostInfo) -> Description {
        good::describe("nan_schedule", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn schedule(_step: &TrainingStep) -> f32 {
        f32::NAN
    }
}

hypercast_sdk::export!(NanSchedule);
