//! SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): spreads the bits of ids and seeds.
//!
//! It is not keyed: whoever chooses the inputs can choose collisions. Maps whose ids come from
//! callers are keyed by [`IdHashKey`].

use std::hash::{BuildHasher, Hasher};

use crate::entropy;

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

/// The random key of one map by 64-bit ids. A hash costs a few multiplications, and who does not
/// know the key can choose no ids that collide.
#[derive(Debug, Clone)]
pub struct IdHashKey(u64);

impl Default for IdHashKey {
    fn default() -> IdHashKey {
        IdHashKey(entropy::number())
    }
}

impl BuildHasher for IdHashKey {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher(self.0)
    }
}

/// The hash of 64-bit ids under an [`IdHashKey`].
#[derive(Debug)]
pub struct IdHasher(u64);

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

    /// The inverse of [`mix64`]: an id with a chosen hash.
    fn unmix64(x: u64) -> u64 {
        let x = (x ^ (x >> 31) ^ (x >> 62)).wrapping_mul(0x3196_42b2_d24d_8ec3);
        let x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(0x96de_1b17_3f11_9089);
        x ^ (x >> 30) ^ (x >> 60)
    }

    #[test]
    fn ids_that_are_chosen_to_fall_together_or_are_alike_do_not() {
        let key = IdHashKey::default();
        for id in [|at: u64| unmix64(at << 8), |at: u64| at << 32] {
            let mut low = [0; 256];
            for at in 0..25_600 {
                low[(key.hash_one(id(at)) & 255) as usize] += 1;
            }
            assert!(low.iter().all(|&count| (40..200).contains(&count)), "{low:?}");
        }
        assert!((0..1000).all(|at| mix64(unmix64(at << 8)) == at << 8), "without a key they do");
        let other = IdHashKey::default();
        assert_ne!(key.hash_one(1_u64), other.hash_one(1_u64), "each map has its own");
    }
}
