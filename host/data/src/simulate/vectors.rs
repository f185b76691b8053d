//! What simulated worlds share: small vectors of tastes and items, and draws.

use rand::Rng;

/// The width of a vector of tastes.
pub const DIMENSIONS: usize = 8;

/// What a user likes, or an item is.
pub type LatentVector = [f32; DIMENSIONS];

/// A draw from the standard normal distribution (Box and Muller, 1958).
pub fn normal(rng: &mut impl Rng) -> f32 {
    let radius = (-2.0 * (1.0 - rng.random::<f32>()).ln()).sqrt();
    radius * (std::f32::consts::TAU * rng.random::<f32>()).cos()
}

/// A draw from the exponential distribution, in whole milliseconds.
pub fn exponential_ms(mean_ms: f32, rng: &mut impl Rng) -> i64 {
    (-mean_ms * (1.0 - rng.random::<f32>()).ln()) as i64
}

/// A draw from the standard normal distribution for each dimension.
pub fn noise(rng: &mut impl Rng) -> LatentVector {
    std::array::from_fn(|_| normal(rng))
}

/// The sum of some vectors with their weights.
pub fn blend(parts: &[(f32, LatentVector)]) -> LatentVector {
    std::array::from_fn(|i| parts.iter().map(|(weight, vector)| weight * vector[i]).sum())
}

/// The vector of the same direction and length 1.
pub fn unit(vector: LatentVector) -> LatentVector {
    let norm = dot(&vector, &vector).sqrt().max(1e-6);
    vector.map(|x| x / norm)
}

/// How much two vectors agree: of unit vectors, between -1 and 1.
pub fn dot(a: &LatentVector, b: &LatentVector) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The probability of which `x` is the log odds.
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
