//! Random choices that are functions of a seed and of what is being decided.
//!
//! Training draws nothing from a generator that lives on from step to step: a
//! run that was interrupted and resumed must choose as if it never had been,
//! and threads must not race for the next number.

/// Mixes numbers into one that depends on all of them and on their order.
pub(crate) fn mix(parts: &[u64]) -> u64 {
    parts.iter().fold(0x9E37_79B9_7F4A_7C15, |state, part| {
        let mut z = (state ^ part).wrapping_add(0x9E37_79B9_7F4A_7C15);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// Uniform in `[0, 1)`, from the upper 53 bits of `mix`.
pub(crate) fn uniform(parts: &[u64]) -> f64 {
    (mix(parts) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_even_and_depend_on_every_part_and_its_place() {
        let mean = (0..10_000).map(|i| uniform(&[7, i])).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.015, "within 5 sigma: {mean}");
        assert_ne!(mix(&[1, 2]), mix(&[2, 1]));
        assert_ne!(mix(&[1, 2]), mix(&[1, 3]));
        assert_eq!(mix(&[1, 2]), mix(&[1, 2]));
    }
}
