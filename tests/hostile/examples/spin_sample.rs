//! `sample` never returns.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{ActionBatch, HostInfo};

hostile_expert! {
    fn sample(_info: &HostInfo, _batch: &ActionBatch) -> Vec<f32> {
        loop {
            std::hint::black_box(());
        }
    }
}
