//! `labels` never returns.

use hypercast_hostile as good;
use hypercast_sdk::{ActionBatch, Description, Expert, Graph, HostInfo, TaskLabels};

struct SpinLabels;

impl Expert for SpinLabels {
    fn describe(info: &HostInfo) -> Description {
        good::describe("spin_labels", info)
    }

    fn network(g: &Graph) {
        good::network(g);
    }

    fn labels(_info: &HostInfo, _batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}

hypercast_sdk::export!(SpinLabels);
