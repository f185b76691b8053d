//! `sample` returns keep probabilities that are none, and too many of them.

use hypercast_hostile as good;
use hypercast_sdk::{ActionBatch, Description, Expert, Graph, HostInfo};

struct SampleInvalid;

impl Expert for SampleInvalid {
    fn describe(info: &HostInfo) -> Description {
        good::describe("sample_invalid", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn sample(_info: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
        vec![f32::NAN; batch.actions.len() + 1]
    }
}

hypercast_sdk::export!(SampleInvalid);
