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

/// The column whose mean moved farthest between two standardisers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ColumnShift {
    /// The column's index.
    pub column: usize,
    /// The distance of the means, in standard deviations of before.
    pub deviations: f64,
}

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
        out.extend(row.iter().zip(self.mean.iter().zip(&self.spread)).map(
            |(&value, (&mean, &spread))| {
                if !value.is_finite() {
                    return 0.0;
                }
                (((f64::from(value) - mean) / self.deviation(spread)) as f32).clamp(-LIMIT, LIMIT)
            },
        ));
    }

    /// The column whose mean is farthest from that of `before`, of those that had several values
    /// there; `None` without any.
    ///
    /// # Panics
    /// If the two have different numbers of columns.
    pub fn shift_from(&self, before: &Standardiser) -> Option<ColumnShift> {
        assert_eq!(before.width(), self.width());
        let shift = |column: usize| ColumnShift {
            column,
            deviations: (self.mean[column] - before.mean[column]).abs()
                / before.deviation(before.spread[column]),
        };
        let varied = (0..self.width()).filter(|&column| before.spread[column] > 0.0);
        varied.map(shift).max_by(|a, b| a.deviations.total_cmp(&b.deviations))
    }

    /// The standard deviation of a column.
    fn deviation(&self, spread: f64) -> f64 {
        // Half a count of unit variance keeps a nearly constant column from exploding.
        ((spread + 0.5) / (self.count.max(1.0) + 0.5)).sqrt().max(1e-4)
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

    #[test]
    fn a_shift_is_that_of_the_column_that_moved_farthest() {
        let mut before = Standardiser::new(2);
        (0..1000).for_each(|i| before.observe(&[(i % 2) as f32, (i % 2) as f32 * 100.0]));
        let mut after = before.clone();
        (0..1000).for_each(|_| after.observe(&[4.5, 100.0]));
        // Means go from 0.5 to 2.5 and from 50 to 75; the deviations are 0.5 and 50.
        let shift = after.shift_from(&before).unwrap();
        assert!(shift.column == 0 && (shift.deviations - 4.0).abs() < 0.01, "{shift:?}");
        assert_eq!(before.shift_from(&before).unwrap().deviations, 0.0);
        let constant = Standardiser { spread: vec![0.0; 2], ..before.clone() };
        assert_eq!(after.shift_from(&constant), None);
    }
}
