//! Quantiles of measured values: the one definition that benches, reports and metrics share.

/// The value at `share` (0 to 1) of the sorted `values`, by the nearest rank; sorts them.
///
/// # Panics
/// Without values.
pub fn quantile(values: &mut [f64], share: f64) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share).round() as usize]
}
