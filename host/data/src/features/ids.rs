//! Maps by 64-bit id, which a request looks into hundreds of times: an id is hashed by a few multiplications.
//!
//! Ids come from outside, so each map mixes in a secret of its own: nobody can choose ids that fall together.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};

use hypercast_core::hash::mix64;

/// Values by id.
pub(super) type IdMap<V> = HashMap<u64, V, Secret>;

/// What a map mixes into its ids.
#[derive(Debug, Clone)]
pub(super) struct Secret(u64);

/// An id on its way to a hash.
#[derive(Debug)]
pub(super) struct Mixed(u64);

impl Default for Secret {
    fn default() -> Secret {
        Secret(RandomState::new().hash_one(0_u64))
    }
}

impl BuildHasher for Secret {
    type Hasher = Mixed;

    fn build_hasher(&self) -> Mixed {
        Mixed(self.0)
    }
}

impl Hasher for Mixed {
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
    fn ids_that_are_alike_do_not_fall_together() {
        let secret = Secret::default();
        let mut low = [0; 256];
        for id in 0..25_600_u64 {
            low[(secret.hash_one(id << 32) & 255) as usize] += 1;
        }
        assert!(low.iter().all(|&count| (40..200).contains(&count)), "{low:?}");
        assert_ne!(secret.hash_one(1_u64), Secret::default().hash_one(1_u64), "a secret each");
    }
}
