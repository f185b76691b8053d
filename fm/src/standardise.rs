//! Running standardisation of numeric columns, so that counts in the thousands and rates below one
//! have similar scales.
//!
//! Training updates the statistics; a checkpoint freezes them. A single row moves them little,
//! whatever is in it: a number counts as at most [`OBSERVED_LIMIT`] standard deviations from the
//! mean. A column whose numbers are larger than that is caught up with in a few rows, because each
//! of them widens the deviation. Old rows are forgotten.
//!
//! Extremes in more than one row of a thousand cannot be told from a column that is rarely not
//! zero, whose deviation is theirs. What bounds those are the ranges of the schema.

use serde::{Deserialize, Serialize};

/// Means and variances of numeric columns (Welford's method).
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Standardiser {
    /// Rows so far, at most [`WINDOW_ROWS`].
    count: f64,
    mean: Vec<f64>,
    /// By column: the sum of squared distances from the mean, of as many rows as it was known in.
    spread: Vec<f64>,
    /// By column: the rows in which it was known, as `count`; empty while that is all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "text_only")]
    known: Vec<f64>,
}

/// Serialises what only formats that name their fields have. In binary ones, whose readers of
/// earlier releases do not expect it, it is nothing: labels, which alone are stored so, are always
/// known, and what their scales have besides is kept apart (`ScaleAddition`).
pub(crate) mod text_only {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(crate) fn serialize<T: Serialize, S: Serializer>(
        value: &T,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() { value.serialize(to) } else { to.serialize_unit() }
    }

    pub(crate) fn deserialize<'d, T, D>(from: D) -> Result<T, D::Error>
    where
        T: Deserialize<'d> + Default,
        D: Deserializer<'d>,
    {
        if from.is_human_readable() { T::deserialize(from) } else { Ok(T::default()) }
    }
}

/// Standardised values are clipped to ± this limit.
const LIMIT: f32 = 5.0;

/// A number further from the mean, in standard deviations, counts as one at this distance. If fewer
/// than 1 in 32² = 1024 rows have such numbers, they cannot widen the deviation without end. A
/// lower limit costs NE: columns that are rarely not zero lose their scale (DECISIONS.md).
pub(crate) const OBSERVED_LIMIT: f64 = 32.0;

/// From this many rows on, each row takes the place of the mean one: the weight of a row falls to
/// 37 % after so many further ones. A whole pass over a data set of a million rows forgets nothing.
const WINDOW_ROWS: f64 = 1e6;

/// The mean and the variance of a column.
#[derive(Debug, Clone, Copy)]
pub struct ColumnMoments {
    /// The mean of its numbers.
    pub mean: f64,
    /// The mean squared distance from it; 0 without rows.
    pub variance: f64,
}

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
        Self { count: 0.0, mean: vec![0.0; width], spread: vec![0.0; width], known: Vec::new() }
    }

    /// The same with more columns, which have seen no row: `places` are the present indices of the
    /// columns of before.
    pub(crate) fn grown(&self, places: &[usize], width: usize) -> Self {
        let mut grown = Self { count: self.count, ..Self::new(width) };
        if places.len() == width {
            return self.clone();
        }
        grown.known = vec![0.0; width];
        for (column, &place) in places.iter().enumerate() {
            grown.mean[place] = self.mean[column];
            grown.spread[place] = self.spread[column];
            grown.known[place] = self.rows_of(column);
        }
        grown
    }

    /// The number of columns of a row.
    pub fn width(&self) -> usize {
        self.mean.len()
    }

    /// The number of rows so far, at most [`WINDOW_ROWS`].
    pub(crate) fn rows(&self) -> f64 {
        self.count
    }

    /// Whether all statistics are finite and each column has a mean and a spread.
    pub fn is_finite(&self) -> bool {
        let all = [&self.mean, &self.spread, &self.known];
        let finite = all.iter().all(|numbers| numbers.iter().all(|number| number.is_finite()));
        let fits = [0, self.width()].contains(&self.known.len());
        self.count.is_finite() && finite && fits && self.spread.len() == self.width()
    }

    /// The rows in which a column was known.
    fn rows_of(&self, column: usize) -> f64 {
        self.known.get(column).copied().unwrap_or(self.count)
    }

    /// The moments of each column.
    pub fn moments(&self) -> impl Iterator<Item = ColumnMoments> + '_ {
        let columns = self.mean.iter().zip(&self.spread).enumerate();
        columns.map(|(column, (&mean, &spread))| {
            let variance = spread / self.rows_of(column).max(1.0);
            ColumnMoments { mean, variance }
        })
    }

    /// Updates the statistics with a row. A value that is not finite is missing, and leaves those
    /// of its column as they are.
    ///
    /// # Panics
    /// If the row has another number of columns.
    pub fn observe(&mut self, row: &[f32]) {
        assert_eq!(row.len(), self.width());
        let is_missing = |value: &f32| !value.is_finite();
        if self.known.is_empty() && row.iter().any(is_missing) {
            self.known = vec![self.count; self.width()];
        }
        for (column, &value) in row.iter().enumerate().filter(|(_, value)| !is_missing(value)) {
            let step = WindowStep::after(self.rows_of(column));
            if let Some(known) = self.known.get_mut(column) {
                *known = step.count;
            }
            let (mean, spread) = (&mut self.mean[column], &mut self.spread[column]);
            let most = OBSERVED_LIMIT * deviation(*spread, step.before);
            let away = (f64::from(value) - *mean).clamp(-most, most);
            let value = *mean + away;
            *mean += away / step.count;
            *spread = *spread * step.fade + away * (value - *mean);
        }
        self.count = WindowStep::after(self.count).count;
    }

    /// The means and deviations as they are, to standardise many rows.
    pub fn frozen(&self) -> FrozenStandardiser {
        let column = |(column, (&mean, &spread)): (usize, (&f64, &f64))| FrozenColumn {
            mean,
            deviation: deviation(spread, self.rows_of(column).max(1.0)),
        };
        FrozenStandardiser(self.mean.iter().zip(&self.spread).enumerate().map(column).collect())
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
                / deviation(before.spread[column], before.rows_of(column).max(1.0)),
        };
        let varied = (0..self.width()).filter(|&column| before.spread[column] > 0.0);
        varied.map(shift).max_by(|a, b| a.deviations.total_cmp(&b.deviations))
    }
}

/// Means and deviations that no row changes.
#[derive(Debug, Clone)]
pub struct FrozenStandardiser(Vec<FrozenColumn>);

#[derive(Debug, Clone, Copy)]
struct FrozenColumn {
    mean: f64,
    deviation: f64,
}

impl FrozenStandardiser {
    /// Appends the standardised row: `(x - mean) / std`, clipped. A value that is not finite gives
    /// 0.
    ///
    /// # Panics
    /// If the row has another number of columns.
    pub fn append(&self, row: &[f32], out: &mut Vec<f32>) {
        assert_eq!(row.len(), self.0.len());
        out.extend(row.iter().zip(&self.0).map(|(&value, column)| {
            let away = ((f64::from(value) - column.mean) / column.deviation) as f32;
            if value.is_finite() { away.clamp(-LIMIT, LIMIT) } else { 0.0 }
        }));
    }
}

/// A row that joins those before it.
struct WindowStep {
    before: f64,
    /// What is left of each row before.
    fade: f64,
    count: f64,
}

impl WindowStep {
    fn after(before: f64) -> WindowStep {
        let kept = before.min(WINDOW_ROWS - 1.0);
        let fade = if kept < before { kept / before } else { 1.0 };
        WindowStep { before, fade, count: kept + 1.0 }
    }
}

/// The standard deviation. Half a row of unit variance stands for none, and keeps a nearly constant
/// column from exploding.
fn deviation(spread: f64, count: f64) -> f64 {
    ((spread + 0.5) / (count + 0.5)).sqrt().max(1e-4)
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
        let frozen = standardiser.frozen();
        frozen.append(&[499.5, 3.0], &mut out);
        frozen.append(&[499.5 + 288.675, f32::NAN], &mut out);
        assert!(out[0].abs() < 1e-3 && out[1].abs() < 1e-3);
        assert!((out[2] - 1.0).abs() < 0.01, "{}", out[2]);
        assert_eq!(out[3], 0.0);
    }

    /// Numbers with mean 3 and deviation 2.
    fn usual(row: u32) -> f32 {
        3.0 + 2.0 * if row.is_multiple_of(2) { 1.0 } else { -1.0 }
    }

    fn moments(rows: impl IntoIterator<Item = f32>) -> ColumnMoments {
        let mut standardiser = Standardiser::new(1);
        rows.into_iter().for_each(|row| standardiser.observe(&[row]));
        standardiser.moments().next().unwrap()
    }

    #[test]
    fn extremes_move_the_statistics_little_whenever_they_come() {
        let extreme = [1e15, -3e38, 1e15];
        let first = moments(extreme.into_iter().chain((0..100_000).map(usual)));
        let late = moments((0..20_000).map(usual).chain(extreme));
        // One row in five thousand.
        let rarely =
            moments((0..100_000).map(|row| if row % 5000 == 4999 { 3e38 } else { usual(row) }));
        for found in [first, late, rarely] {
            let deviation = found.variance.sqrt();
            assert!((found.mean - 3.0).abs() < 0.2 && (1.9..2.6).contains(&deviation), "{found:?}");
        }
    }

    #[test]
    fn a_column_that_is_rarely_not_zero_keeps_its_scale() {
        let found = moments((0..200_000).map(|row| if row % 200 == 199 { 7.0 } else { 0.0 }));
        let expected = 7.0 * (0.005f64 * 0.995).sqrt();
        assert!((found.variance.sqrt() / expected - 1.0).abs() < 0.02, "{found:?}");
    }

    #[test]
    fn missing_numbers_leave_a_column_as_it_is() {
        let mut standardiser = Standardiser::new(2);
        (0..20_000).for_each(|row| {
            let is_known = row % 10 == 9;
            standardiser.observe(&[if is_known { usual(row / 10) } else { f32::NAN }, usual(row)]);
        });
        for found in standardiser.moments() {
            let deviation = found.variance.sqrt();
            assert!((found.mean - 3.0).abs() < 0.05 && (deviation - 2.0).abs() < 0.05, "{found:?}");
        }
        let text = serde_json::to_string(&standardiser).unwrap();
        assert_eq!(serde_json::from_str::<Standardiser>(&text).unwrap(), standardiser);
    }

    #[test]
    fn large_numbers_are_caught_up_with() {
        let rows = |row: u32| 1e6 + 5e5 * (usual(row) - 3.0);
        let found = moments((0..20_000).map(rows));
        assert!((found.mean / 1e6 - 1.0).abs() < 0.01, "{found:?}");
        assert!((found.variance.sqrt() / 1e6 - 1.0).abs() < 0.05, "{found:?}");
    }

    #[test]
    fn old_rows_are_forgotten() {
        let shifted =
            (0..6_000_000).map(|row| usual(row) + if row < 1_500_000 { 0.0 } else { 4.0 });
        let found = moments(shifted);
        assert!((found.mean - 7.0).abs() < 0.1, "{found:?}");
        assert!((found.variance.sqrt() - 2.0).abs() < 0.1, "{found:?}");
    }

    #[test]
    fn statistics_of_earlier_releases_load() {
        let saved = r#"{"count": 5000000.0, "mean": [2.0], "spread": [20000000.0]}"#;
        let mut standardiser: Standardiser = serde_json::from_str(saved).unwrap();
        standardiser.observe(&[2.0]);
        let found = standardiser.moments().next().unwrap();
        assert!((found.variance - 4.0).abs() < 1e-3 && found.mean == 2.0, "{found:?}");
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
