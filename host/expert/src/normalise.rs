//! Standardisation of numeric features by the mean and deviation of the training log. It is saved
//! with the parameters, and training and serving apply the same one. TAEs are not standardised.

use hypercast_fm::example::Example;
use serde::{Deserialize, Serialize};

/// Standardised values are clipped to this range.
const CLIP: f32 = 5.0;

/// Mean and deviation of each numeric column of the schema.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Normaliser {
    /// The columns' names, in the order of `Target::features`.
    pub names: Vec<String>,
    /// The mean of each column.
    pub mean: Vec<f32>,
    /// The standard deviation of each column; 1 for a constant one.
    pub deviation: Vec<f32>,
}

impl Normaliser {
    /// Leaves values as they are, but clips them.
    pub fn identity(names: &[String]) -> Normaliser {
        Normaliser {
            names: names.to_vec(),
            mean: vec![0.0; names.len()],
            deviation: vec![1.0; names.len()],
        }
    }

    /// How column `index` is standardised.
    pub fn scale(&self, index: usize) -> ColumnScale {
        ColumnScale { mean: self.mean[index], deviation: self.deviation[index] }
    }
}

/// How one column is standardised.
#[derive(Debug, Clone, Copy)]
pub struct ColumnScale {
    mean: f32,
    deviation: f32,
}

impl ColumnScale {
    /// The standardised value; 0 for a value that is not finite.
    #[inline]
    pub fn apply(self, value: f32) -> f32 {
        let scaled = ((value - self.mean) / self.deviation).clamp(-CLIP, CLIP);
        if value.is_finite() { scaled } else { 0.0 }
    }
}

/// Computes a [`Normaliser`] from examples (Welford's method).
#[derive(Debug, Clone)]
pub struct FeatureStatistics {
    names: Vec<String>,
    columns: Vec<ColumnMoments>,
}

#[derive(Debug, Clone, Copy, Default)]
struct ColumnMoments {
    count: f64,
    mean: f64,
    squares: f64,
}

impl FeatureStatistics {
    /// Statistics of no example. `names` are the schema's `feature_columns`.
    pub fn new(names: &[String]) -> FeatureStatistics {
        FeatureStatistics {
            names: names.to_vec(),
            columns: vec![ColumnMoments::default(); names.len()],
        }
    }

    /// Adds every target of an example. Values that are not finite are skipped.
    pub fn observe(&mut self, example: &Example) {
        for target in &example.targets {
            for (moments, value) in self.columns.iter_mut().zip(&target.features) {
                moments.add(*value);
            }
        }
    }

    /// The normaliser of all observed examples.
    pub fn finish(self) -> Normaliser {
        let deviation = |moments: &ColumnMoments| {
            let deviation = (moments.squares / moments.count.max(1.0)).sqrt();
            if deviation > 1e-6 { deviation as f32 } else { 1.0 }
        };
        Normaliser {
            mean: self.columns.iter().map(|moments| moments.mean as f32).collect(),
            deviation: self.columns.iter().map(deviation).collect(),
            names: self.names,
        }
    }
}

impl ColumnMoments {
    fn add(&mut self, value: f32) {
        if !value.is_finite() {
            return;
        }
        let value = f64::from(value);
        self.count += 1.0;
        let delta = value - self.mean;
        self.mean += delta / self.count;
        self.squares += delta * (value - self.mean);
    }
}
