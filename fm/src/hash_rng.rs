//! Random numbers as pure functions of a seed and of what is being decided.
//!
//! Training keeps no generator whose state moves from step to step. A run that was interrupted and
//! resumed therefore makes the same choices as one that never stopped, and threads cannot race for
//! the next number.

use hypercast_core::hash::mix_parts;

/// Uniform in `[0, 1)`, from the upper 53 bits of the hash of `parts`, which depends on all of them
/// and on their order.
pub(crate) fn uniform(parts: &[u64]) -> f64 {
    (mix_parts(parts) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_depend_on_every_part_and_on_the_order() {
        let mean = (0..10_000).map(|i| uniform(&[7, i])).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.015, "within 5 sigma: {mean}");
        assert_ne!(uniform(&[1, 2]), uniform(&[2, 1]));
        assert_ne!(uniform(&[1, 2]), uniform(&[1, 3]));
        assert_eq!(uniform(&[1, 2]), uniform(&[1, 2]));
    }
}
