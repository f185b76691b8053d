//! `sample` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{ActionBatch, Description, Expert, Graph, HostInfo};

struct SpinSample;

impl Expert for SpinSample {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin_sample", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn sample(_info: &HostInfo, _batch: &ActionBatch) -> Vec<f32> {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(SpinSample);
