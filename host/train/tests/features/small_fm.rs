//! A small FM, and what it learns of a data set.

use std::path::Path;

use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    },
};
use hypercast_fm::{
    device::DeviceKind,
    example::Example,
    metrics::LogLossSums,
    spec::FmConfig,
    trainer::{self, FmTrainer},
};
use hypercast_train::fm::fm_spec;

/// Requests that the FM learns from together.
const BATCH: usize = 32;

/// Settings with which a few thousand requests are enough.
pub fn config() -> FmConfig {
    FmConfig {
        dim: 16,
        layers: 1,
        qk_dim: 8,
        v_dim: 8,
        embedding_dim: 8,
        max_history: 4,
        learning_rate: 1e-2,
        warmup_steps: 5,
        average_decay: 0.0,
        ..FmConfig::default()
    }
}

/// A trainer of an FM for a data set, in the folder `work`.
pub fn trainer(dataset: &Dataset, config: &FmConfig, work: &Path) -> Box<dyn FmTrainer> {
    let spec = fm_spec(&dataset.schema).unwrap();
    trainer::create(work, config, &spec, DeviceKind::Cpu).unwrap()
}

/// All requests of a data set, in the order of time.
pub fn examples(dataset: &Dataset) -> Vec<Example> {
    let options = ReplayOptions {
        span: Span::default(),
        history_len: 4,
        max_targets: 8,
        features: FeatureConfig::default(),
    };
    Replay::new(dataset, options).unwrap().map(Result::unwrap).collect()
}

/// Learns from requests; gives the NE of the second half of them, each predicted before it was
/// learned.
pub fn learn(trainer: &mut dyn FmTrainer, examples: &[Example]) -> f64 {
    let mut sums = LogLossSums::default();
    for (at, batch) in examples.chunks(BATCH).enumerate() {
        let output = trainer.step(&batch.iter().collect::<Vec<_>>()).unwrap();
        if at * 2 * BATCH >= examples.len() {
            let rows = output.predictions.iter().zip(&output.labels);
            rows.for_each(|(&prediction, &label)| sums.push(prediction, label == 1.0));
        }
    }
    sums.normalized_entropy().unwrap()
}
