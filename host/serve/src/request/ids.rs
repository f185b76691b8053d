//! Ids of requests: unique over daemons and restarts, and exact in JSON.

use std::{
    hash::{BuildHasher, RandomState},
    sync::atomic::{AtomicU64, Ordering},
};

use hypercast_core::clock::now_ms;

/// 2024-01-01 in seconds since the epoch; 29 bits of seconds last until 2041.
const EPOCH_S: i64 = 1_704_067_200;

/// Bits for the process, and for the requests of a second.
const BITS: u32 = 12;

/// Generates ids of 53 bits for one process: the second, a random number of the process, and a
/// counter. More requests than fit a second borrow from the next one.
#[derive(Debug)]
pub struct RequestIds {
    process: u64,
    /// Second and counter of the last id.
    last: AtomicU64,
}

impl RequestIds {
    /// An id that this process has not given before.
    pub fn next(&self) -> u64 {
        let second = (now_ms() / 1000 - EPOCH_S).clamp(1, (1 << 29) - 1) as u64;
        let after = |last: u64| Some((second << BITS).max(last + 1));
        let last = self.last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after);
        let next = after(last.unwrap_or_else(|last| last)).unwrap_or_default();
        let (second, counter) = (next >> BITS, next & ((1 << BITS) - 1));
        ((second << (2 * BITS)) | (self.process << BITS) | counter) & ((1 << 53) - 1)
    }
}

impl Default for RequestIds {
    fn default() -> Self {
        // The standard library seeds its maps randomly for each process.
        let process = RandomState::new().hash_one(std::process::id()) & ((1 << BITS) - 1);
        Self { process, last: AtomicU64::new(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_of_a_process_differ_even_where_many_come_at_once() {
        let ids = RequestIds::default();
        let made: std::collections::BTreeSet<u64> = (0..20_000).map(|_| ids.next()).collect();
        assert_eq!(made.len(), 20_000);
        assert!(made.iter().all(|&id| id > 0 && id < 1 << 53));
        let process = |id: u64| id >> BITS & ((1 << BITS) - 1);
        assert!(made.iter().all(|&id| process(id) == ids.process));
    }
}
