//! `sample` returns NaN as keep probabilities, and one too many.

use hypercast_hostile::hostile_expert;
use hypercast_sdk::{ActionBatch, HostInfo};

hostile_expert! {
    fn sample(_info: &HostInfo, batch: &ActionBatch) -> Vec<f32> {
        vec![f32::NAN; batch.actions.len() + 1]
    }
}
