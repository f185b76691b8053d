//! The last values of something, for percentiles of what happens now.

/// Values that are kept.
const KEPT: usize = 1024;

/// The last values, and how many there ever were.
#[derive(Debug, Clone, Default)]
pub struct Recent {
    values: Vec<f64>,
    next: usize,
    /// Values so far.
    pub count: u64,
}

impl Recent {
    /// Adds a value; the oldest makes room.
    pub fn push(&mut self, value: f64) {
        self.count += 1;
        if self.values.len() < KEPT {
            self.values.push(value);
        } else {
            self.values[self.next] = value;
            self.next = (self.next + 1) % KEPT;
        }
    }

    /// Values that are kept.
    pub fn kept(&self) -> usize {
        self.values.len()
    }

    /// The values below which these shares of the kept ones are; none before the first value.
    pub fn quantiles<const N: usize>(&self, shares: [f64; N]) -> Option<[f64; N]> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        Some(shares.map(|share| sorted[((last as f64 * share).round() as usize).min(last)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_last_values() {
        let mut recent = Recent::default();
        assert_eq!(recent.quantiles([0.5]), None);
        for value in 0..KEPT * 3 {
            recent.push(value as f64);
        }
        assert_eq!(recent.count, KEPT as u64 * 3);
        let [least, median, most] = recent.quantiles([0.0, 0.5, 1.0]).unwrap();
        assert_eq!((least, most), (KEPT as f64 * 2.0, KEPT as f64 * 3.0 - 1.0));
        assert!((median - KEPT as f64 * 2.5).abs() <= 1.0, "{median}");
    }
}
