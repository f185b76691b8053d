//! `labels` never returns.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{ActionBatch, HostInfo, TaskLabels};

hostile_expert! {
    fn labels(_info: &HostInfo, _batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        loop {
            std::hint::black_box(());
        }
    }
}
