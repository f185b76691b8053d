//! Standardisation of numeric features by the mean and deviation of the training log. It is saved
//! with the parameters, and training and serving apply the same one. TAEs are not standardised.

use hypercast_fm::example::Example;
use hypercast_fm::standardise::{ColumnMoments, Standardiser};
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

    /// The same for the columns `names`, if all of its own are among them. It leaves the others as
    /// they are: they were added after it was made.
    pub fn grown(&self, names: &[String]) -> Option<Normaliser> {
        let mut grown = Normaliser::identity(names);
        for (own, name) in self.names.iter().enumerate() {
            let place = names.iter().position(|other| other == name)?;
            grown.mean[place] = self.mean[own];
            grown.deviation[place] = self.deviation[own];
        }
        Some(grown)
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

/// Computes a [`Normaliser`] from examples.
#[derive(Debug, Clone)]
pub struct FeatureStatistics {
    names: Vec<String>,
    columns: Standardiser,
}

impl FeatureStatistics {
    /// Statistics of no example. `names` are the schema's `feature_columns`.
    pub fn new(names: &[String]) -> FeatureStatistics {
        FeatureStatistics { names: names.to_vec(), columns: Standardiser::new(names.len()) }
    }

    /// Adds every target of an example. Extremes count for little, as in the FM's statistics.
    ///
    /// # Panics
    /// A target has another number of features.
    pub fn observe(&mut self, example: &Example) {
        example.targets.iter().for_each(|target| self.columns.observe(&target.features));
    }

    /// The normaliser of all observed examples.
    pub fn finish(self) -> Normaliser {
        let deviation = |moments: ColumnMoments| {
            let deviation = moments.variance.sqrt();
            if deviation > 1e-6 { deviation as f32 } else { 1.0 }
        };
        Normaliser {
            mean: self.columns.moments().map(|moments| moments.mean as f32).collect(),
            deviation: self.columns.moments().map(deviation).collect(),
            names: self.names,
        }
    }
}
