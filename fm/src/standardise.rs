//! Running standardisation of numeric columns, so that counts in the thousands and rates below one
//! have similar scales.
//!
//! Training updates the statistics; a checkpoint freezes them.

use serde::{Deserialize, Serialize};

/// Means and variances of numeric columns (Welford's method).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Standardiser {
    count: f64,
    mean: Vec<f64>,
    /// By column: the sum of squared distances from the mean.
    spread: Vec<f64>,
}

/// Standardised values are clipped to ± this limit.
const LIMIT: f32 = 5.0;

impl Standardiser {
    /// Statistics of rows of `width` columns, before the first row.
    pub fn new(width: usize) -> Self {
        Self { count: 0.0, mean: vec![0.0; width], spread: vec![0.0; width] }
    }

    /// The number of columns of a row.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// Whether all statistics are finite and each column has a mean and a spread.
    pub fn is_finite(&self) -> bool {
        let all = [&self.mean, &self.spread];
        let finite = all.iter().all(|numbers| numbers.iter().all(|number| number.is_finite()));
        self.count.is_finite() && finite && self.spread.len() == self.width()
    }

    /// Updates the statistics with a row. Values that are not finite count as the mean.
    ///
    /// # Panics
    /// If the row has another number of columns.
    pub fn observe(&mut self, row: &[f32]) {
        assert_eq!(row.len(), self.width());
        self.count += 1.0;
        for ((&value, mean), spread) in row.iter().zip(&mut self.mean).zip(&mut self.spread) {
            let value = if value.is_finite() { f64::from(value) } else { *mean };
            let before = value - *mean;
            *mean += before / self.count;
            *spread += before * (value - *mean);
        }
    }

    /// Appends the standardised row: `(x - mean) / std`, clipped. A value that is not finite gives
    /// 0.
    ///
    /// # Panics
    /// If the row has another number of columns.
    pub fn append(&self, row: &[f32], out: &mut Vec<f32>) {
        assert_eq!(row.len(), self.width());
        let count = self.count.max(1.0);
        out.extend(row.iter().zip(self.mean.iter().zip(&self.spread)).map(
            |(&value, (&mean, &spread))| {
                if !value.is_finite() {
                    return 0.0;
                }
                // Half a count of unit variance keeps a nearly constant column from exploding.
                let deviation = ((spread + 0.5) / (count + 0.5)).sqrt().max(1e-4);
                (((f64::from(value) - mean) / deviation) as f32).clamp(-LIMIT, LIMIT)
            },
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn standardised_rows_have_mean_zero_and_unit_variance() {
        let mut standardiser = Standardiser::new(2);
        for i in 0..1000 {
            standardiser.observe(&[i as f32, 3.0]);
        }
        let mut out = Vec::new();
        standardiser.append(&[499.5, 3.0], &mut out);
        standardiser.append(&[499.5 + 288.675, f32::NAN], &mut out);
        assert!(out[0].abs() < 1e-3 && out[1].abs() < 1e-3);
        assert!((out[2] - 1.0).abs() < 0.01, "{}", out[2]);
        assert_eq!(out[3], 0.0);
    }
}
