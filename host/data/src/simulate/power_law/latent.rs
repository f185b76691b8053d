//! The latent vectors of the power-law world and the memory of its users.
//!
//! Vectors are functions of the seed and a code: none is stored, so that a million items take no
//! memory.

use hypercast_core::hash::{mix_parts, splitmix64};

/// Dimensions of an item's vector.
pub(super) const DIMENSIONS: usize = 64;

/// Dimension `k` explains a share of the variance that falls as `k` to the minus this.
pub(super) const SPECTRUM_EXPONENT: f32 = 1.5;

/// How fast the pull of an event falls with its lag in events: a Pareto tail of this index.
pub(super) const LAG_EXPONENT: f32 = 1.0;

/// The longest lag that the tail reaches is about 2 to the power of this.
const LAG_SCALES: usize = 12;

/// Coordinates have mean 0 and variance 1 each; what a dimension counts is in [`spectrum`].
pub(super) type Coordinates = [f32; DIMENSIONS];

/// What a vector belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) enum VectorOf {
    Topic,
    Style,
    Creator,
    Item,
    Cohort,
    Everybody,
}

/// The coordinates of a code: each is about standard normal, as the sum of four uniform values
/// (Irwin and Hall), which is the same on every machine.
pub(super) fn coordinates(seed: u64, of: VectorOf, code: u64) -> Coordinates {
    let base = mix_parts(&[seed, of as u64, code]);
    std::array::from_fn(|dimension| {
        let bits = splitmix64(base ^ dimension as u64);
        let sum: u32 = (0..4).map(|part| (bits >> (16 * part)) as u32 & 0xffff).sum();
        // The sum of four uniform values has mean 2 and variance 1/3.
        (sum as f32 / 65_536.0 - 2.0) * 3f32.sqrt()
    })
}

/// What each dimension counts: the root of its share of the variance. The squares sum to 1.
pub(super) fn spectrum() -> Coordinates {
    let share = |dimension: usize| (1.0 + dimension as f32).powf(-SPECTRUM_EXPONENT);
    let total: f32 = (0..DIMENSIONS).map(share).sum();
    std::array::from_fn(|dimension| (share(dimension) / total).sqrt())
}

/// The sum of `parts`, each with its weight.
pub(super) fn weighted_sum(parts: &[(f32, Coordinates)]) -> Coordinates {
    std::array::from_fn(|at| parts.iter().map(|(weight, vector)| weight * vector[at]).sum())
}

/// The coordinates swapped in pairs, one of each with the other sign: what complements a vector. It
/// is orthogonal to it.
pub(super) fn complement(vector: &Coordinates) -> Coordinates {
    std::array::from_fn(|at| if at % 2 == 0 { -vector[at + 1] } else { vector[at - 1] })
}

/// The sum of a user's events, each weighted by its lag. A Pareto tail is a mixture of
/// exponentials, so it takes a vector for each scale and no list of events.
#[derive(Debug, Clone)]
pub(super) struct ParetoMemory([Coordinates; LAG_SCALES]);

impl ParetoMemory {
    pub(super) fn new() -> Self {
        Self([[0.0; DIMENSIONS]; LAG_SCALES])
    }

    /// Adds the newest event with its weight; those of before age by one.
    pub(super) fn push(&mut self, weight: f32, vector: &Coordinates) {
        for (scale, sums) in self.0.iter_mut().enumerate() {
            let keep = decay(scale);
            sums.iter_mut().zip(vector).for_each(|(sum, x)| *sum = keep * *sum + weight * x);
        }
    }

    /// The weighted sum. The squares of the weights of all lags sum to 1.
    pub(super) fn sum(&self, norm: f32) -> Coordinates {
        std::array::from_fn(|at| {
            let scales = self.0.iter().enumerate();
            scales.map(|(scale, sums)| share(scale) * sums[at]).sum::<f32>() / norm
        })
    }
}

/// The root of the sum of squared weights over all lags.
pub(super) fn lag_norm() -> f32 {
    let square = |lag| lag_weight(lag).powi(2);
    (0..16 << LAG_SCALES).map(square).sum::<f32>().sqrt()
}

/// The weight of the event that `lag` events followed, before normalisation.
pub(super) fn lag_weight(lag: i32) -> f32 {
    (0..LAG_SCALES).map(|scale| share(scale) * decay(scale).powi(lag)).sum()
}

fn decay(scale: usize) -> f32 {
    (-(0.5f32.powi(scale as i32))).exp()
}

fn share(scale: usize) -> f32 {
    0.5f32.powf(LAG_EXPONENT * scale as f32)
}
