//! Random numbers as pure functions of a seed and of what is being decided.
//!
//! Training keeps no generator whose state moves from step to step. A run that was interrupted and
//! resumed therefore makes the same choices as one that never stopped, and threads cannot race for
//! the next number. The mixing function is the finaliser of SplitMix64.

/// The increment of SplitMix64: 2^64 divided by the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// One step of SplitMix64 from `state`: a bijection whose output bits all depend on all input bits.
pub(crate) fn splitmix64(state: u64) -> u64 {
    let mut z = state.wrapping_add(GOLDEN_GAMMA);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A hash of several numbers that depends on all of them and on their order.
pub(crate) fn hash_parts(parts: &[u64]) -> u64 {
    parts.iter().fold(GOLDEN_GAMMA, |state, part| splitmix64(state ^ part))
}

/// Uniform in `[0, 1)`, from the upper 53 bits of [`hash_parts`].
pub(crate) fn uniform(parts: &[u64]) -> f64 {
    (hash_parts(parts) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_uniform_and_depend_on_every_part_and_on_the_order() {
        let mean = (0..10_000).map(|i| uniform(&[7, i])).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.015, "within 5 sigma: {mean}");
        assert_ne!(hash_parts(&[1, 2]), hash_parts(&[2, 1]));
        assert_ne!(hash_parts(&[1, 2]), hash_parts(&[1, 3]));
        assert_eq!(hash_parts(&[1, 2]), hash_parts(&[1, 2]));
    }

    #[test]
    fn splitmix64_matches_the_reference_sequence() {
        // The first two outputs of the reference implementation for seed 0.
        assert_eq!(splitmix64(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(splitmix64(GOLDEN_GAMMA), 0x6E78_9E6A_A1B9_65F4);
    }
}
