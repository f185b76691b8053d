//! Small vectors of tastes and items, and draws.

use hypercast_core::hash::{mix_parts, splitmix64};
use rand::{Rng, SeedableRng, rngs::SmallRng};

const DIMENSIONS: usize = 8;

pub(super) type LatentVector = [f32; DIMENSIONS];

/// A generator that depends on `parts` alone.
pub(super) fn rng_of(parts: &[u64]) -> SmallRng {
    SmallRng::seed_from_u64(splitmix64(mix_parts(parts)))
}

/// A draw from the standard normal distribution (Box and Muller, 1958).
pub(super) fn normal(rng: &mut impl Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

/// A draw from the exponential distribution, in whole milliseconds.
pub(super) fn exponential_ms(mean_ms: f32, rng: &mut impl Rng) -> i64 {
    (-mean_ms * (1.0 - rng.random::<f32>()).ln()) as i64
}

pub(super) fn noise(rng: &mut impl Rng) -> LatentVector {
    std::array::from_fn(|_| normal(rng))
}

pub(super) fn blend(parts: &[(f32, LatentVector)]) -> LatentVector {
    std::array::from_fn(|i| parts.iter().map(|(weight, vector)| weight * vector[i]).sum())
}

pub(super) fn unit(vector: LatentVector) -> LatentVector {
    let norm = dot(&vector, &vector).sqrt().max(1e-6);
    vector.map(|x| x / norm)
}

pub(super) fn dot(a: &LatentVector, b: &LatentVector) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
