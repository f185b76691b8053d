//! SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): spreads the bits of ids and seeds.
//!
//! It is not keyed: whoever chooses the inputs can choose collisions.

use std::hash::Hasher;

/// The increment of the generator: 2^64 over the golden ratio.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser alone: a bijection that spreads every bit; 0 stays 0.
pub fn mix64(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The generator's output for the state `x`: a bijection that looks random.
pub fn splitmix64(x: u64) -> u64 {
    mix64(x.wrapping_add(GOLDEN_GAMMA))
}

/// One number that depends on all `parts` and on their order.
pub fn mix_parts(parts: &[u64]) -> u64 {
    parts.iter().fold(GOLDEN_GAMMA, |state, part| splitmix64(state ^ part))
}

/// The hash of 64-bit ids, for maps: a few multiplications an id.
#[derive(Debug, Default)]
pub struct IdHasher(u64);

impl IdHasher {
    /// A hasher whose results depend on `key`, so that who does not know it can choose no
    /// collisions.
    pub fn keyed(key: u64) -> IdHasher {
        IdHasher(key)
    }
}

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.write_u64(byte.into()));
    }

    fn write_u64(&mut self, id: u64) {
        self.0 = mix64(self.0 ^ id);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_the_published_one() {
        // The first outputs for seed 0.
        assert_eq!(splitmix64(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(splitmix64(GOLDEN_GAMMA), 0x6e78_9e6a_a1b9_65f4);
    }

    #[test]
    fn parts_and_their_order_count() {
        assert_ne!(mix_parts(&[1, 2]), mix_parts(&[2, 1]));
        assert_ne!(mix_parts(&[1]), mix_parts(&[1, 0]));
    }
}
