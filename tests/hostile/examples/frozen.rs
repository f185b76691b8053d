//! `schedule` lets no step change anything: harmless to others, and the proof that its word is taken.

use hypercast_hostile as good;
use hypercast_sdk::{Description, Expert, Graph, HostInfo, TrainingStep};

struct Frozen;

impl Expert for Frozen {
    fn describe(info: &HostInfo) -> Description {
        good::describe("frozen", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn schedule(_step: &TrainingStep) -> f32 {
        0.0
    }
}

hypercast_sdk::export!(Frozen);
