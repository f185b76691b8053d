//! Settings for a data set that nobody has tuned any for: from its size alone.
//!
//! The three data sets of the demo have presets that were found by trial, and these rules lead to
//! about the same. They are a beginning; `--config` or `hypercast.toml` changes it.

use std::collections::{BTreeMap, HashMap};

use hypercast_config::{ExpertTraining, Logs, PluginLimits};
use hypercast_core::quantile::quantile;
use hypercast_data::dataset::Dataset;
use hypercast_fm::spec::FmConfig;

use crate::error::Result;

/// Steps that an FM should have at least.
const FM_STEPS: u64 = 1500;

/// Below this many requests the learning rates are those of a short training.
const FEW_REQUESTS: u64 = 50_000;

/// Below this many requests those of the sparse rows are still higher than usual.
const SOME_REQUESTS: u64 = 200_000;

/// Below this many rows models are half as wide.
const FEW_ROWS: u64 = 50_000;

/// Rows that an expert should see, in all its passes.
const EXPERT_ROWS: u64 = 300_000;

/// Rows that an experiment of three seeds gets through in a quarter of an hour on two cores.
const EXPERIMENT_ROWS: f64 = 150_000.0;

/// Rows of a surface from which on most of its negatives say little that is new.
const MANY_ROWS: u64 = 1_000_000;

/// Negatives for each row with an action that are enough then.
const NEGATIVES_A_POSITIVE: u64 = 20;

/// The size of a data set, as far as settings depend on it.
#[derive(Debug, Clone)]
pub struct DatasetSize {
    /// Requests that are not mere history.
    pub requests: u64,
    /// The rows of these requests.
    pub rows: u64,
    /// Rows that are mere history.
    pub history_only: u64,
    /// Rows of a request that nine in ten do not exceed.
    pub request_rows: usize,
    /// Events of a user that nine in ten do not exceed.
    pub user_events: usize,
    /// Those of each surface.
    pub surfaces: BTreeMap<String, SurfaceSize>,
}

/// The size of a surface, without mere history.
#[derive(Debug, Clone, Copy, Default)]
pub struct SurfaceSize {
    /// Rows of the log, each an item that was shown.
    pub rows: u64,
    /// Rows with an action.
    pub positives: u64,
}

impl SurfaceSize {
    /// The share of rows without an action that training keeps.
    fn kept_negatives(&self) -> f32 {
        let negatives = self.rows - self.positives;
        let enough = NEGATIVES_A_POSITIVE * self.positives;
        if self.rows < MANY_ROWS || enough == 0 || enough >= negatives {
            return 1.0;
        }
        (enough as f64 / negatives as f64) as f32
    }
}

impl DatasetSize {
    /// Measures a data set.
    ///
    /// # Errors
    /// A data set that cannot be read.
    pub fn of(dataset: &Dataset) -> Result<Self> {
        let (mut last, mut rows, mut history_only) = (None, 0, 0);
        let mut request_rows: Vec<f64> = Vec::new();
        let mut events: HashMap<u64, u32> = HashMap::new();
        let names = &dataset.schema.surfaces;
        let mut surfaces = vec![SurfaceSize::default(); names.len()];
        for impression in dataset.impressions()? {
            let impression = impression?;
            *events.entry(impression.user).or_default() += 1;
            if impression.history_only {
                history_only += 1;
                continue;
            }
            rows += 1;
            if let Some(surface) = surfaces.get_mut(usize::from(impression.surface)) {
                surface.rows += 1;
                surface.positives += u64::from(impression.outcome.has_action());
            }
            let request = Some((impression.time_ms, impression.request));
            match request_rows.last_mut().filter(|_| last == request) {
                Some(count) => *count += 1.0,
                None => request_rows.push(1.0),
            }
            last = request;
        }
        let mut user_events: Vec<f64> = events.into_values().map(f64::from).collect();
        let most = |values: &mut [f64]| {
            if values.is_empty() { 1 } else { quantile(values, 0.9) as usize }
        };
        Ok(Self {
            requests: request_rows.len() as u64,
            rows,
            history_only,
            request_rows: most(&mut request_rows),
            user_events: most(&mut user_events),
            surfaces: names.iter().cloned().zip(surfaces).collect(),
        })
    }

    /// Settings of the FM.
    pub fn fm(&self) -> FmConfig {
        let &Self { requests, rows, user_events, request_rows, .. } = self;
        let default = FmConfig::default();
        let batch_requests = power_of_two(requests / FM_STEPS).clamp(8, default.batch_requests);
        // Few steps have to be longer, those of ids that are seen a few times most of all.
        let (learning_rate, sparse_learning_rate) = if requests < FEW_REQUESTS {
            (2e-3, 0.1)
        } else if requests < SOME_REQUESTS {
            (default.learning_rate, 0.06)
        } else {
            (default.learning_rate, default.sparse_learning_rate)
        };
        let narrow = usize::from(self.is_narrow());
        let kept = |(name, size): (&String, &SurfaceSize)| (name.clone(), size.kept_negatives());
        FmConfig {
            dim: default.dim >> narrow,
            qk_dim: default.qk_dim >> narrow,
            v_dim: default.v_dim >> narrow,
            max_history: user_events.next_power_of_two().clamp(16, 128),
            max_targets: request_rows.next_power_of_two().clamp(4, 64),
            batch_requests,
            learning_rate,
            sparse_learning_rate,
            sample_negatives: self.surfaces.iter().map(kept).filter(|of| of.1 < 1.0).collect(),
            pretraining_passes: if self.history_only > rows { 2 } else { 1 },
            ..default
        }
    }

    /// What an expert may cost beside that FM: it is no smaller where the FM is.
    pub fn max_flops_share(&self) -> f64 {
        if self.is_narrow() { 1.0 } else { PluginLimits::default().max_flops_share }
    }

    /// Whether so few rows are learned better by an FM of half the width.
    fn is_narrow(&self) -> bool {
        self.rows < FEW_ROWS
    }

    /// Settings of the experts' training.
    pub fn expert_training(&self) -> ExpertTraining {
        let default = ExpertTraining::default();
        let epochs = (EXPERT_ROWS / self.rows.max(1)).clamp(1, 3) as usize;
        let steps = self.rows * epochs as u64 / FM_STEPS;
        let batch_rows = power_of_two(steps).clamp(128, default.batch_rows);
        ExpertTraining { epochs, batch_rows, ..default }
    }

    /// Settings of the logs: TAEs of an FM that has seen little are of little use, unless it has
    /// learned from past histories.
    pub fn logs(&self) -> Logs {
        let skip_share = if self.history_only > self.rows { 0.0 } else { 0.4 };
        Logs { skip_share, ..Logs::default() }
    }

    /// The share of users that an experiment takes.
    pub fn experiment_share(&self) -> f64 {
        (EXPERIMENT_ROWS / self.rows.max(1) as f64).min(1.0)
    }
}

/// The greatest power of two up to a number, 1 at least.
fn power_of_two(number: u64) -> usize {
    1 << number.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(requests: u64, rows: u64) -> DatasetSize {
        let surfaces = BTreeMap::new();
        DatasetSize { requests, rows, history_only: 0, request_rows: 6, user_events: 300, surfaces }
    }

    #[test]
    fn many_negatives_of_a_large_surface_are_sampled() {
        let mut size = size(1_000_000, 10_000_000);
        let surfaces = [
            ("rare", 4_010_000, 10_000),
            ("often", 4_000_000, 400_000),
            ("small", 900_000, 9),
            ("silent", 2_000_000, 0),
        ];
        size.surfaces = surfaces
            .map(|(name, rows, positives)| (name.to_owned(), SurfaceSize { rows, positives }))
            .into();
        assert_eq!(size.fm().sample_negatives, [("rare".to_owned(), 0.05)].into());
    }

    #[test]
    fn small_data_gets_many_small_steps_and_large_data_the_defaults() {
        let small = size(3000, 18_000).fm();
        assert_eq!((small.batch_requests, small.dim, small.max_history), (8, 32, 128));
        assert!(small.validate().is_ok() && small.max_targets == 8);
        let (large, default) = (size(1_000_000, 10_000_000), FmConfig::default());
        let fm = large.fm();
        assert_eq!((fm.batch_requests, fm.dim), (default.batch_requests, default.dim));
        assert_eq!(fm.sparse_learning_rate, default.sparse_learning_rate);
        assert_eq!((large.expert_training().epochs, large.expert_training().batch_rows), (1, 512));
        assert!(large.experiment_share() < 0.02 && size(1, 1).experiment_share() == 1.0);
    }
}
