//! `schedule` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, TrainingStep};

struct SpinSchedule;

impl Expert for SpinSchedule {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin_schedule", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn schedule(_step: &TrainingStep) -> f32 {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(SpinSchedule);
