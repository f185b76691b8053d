//! Counts of an expert's requests and faults, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};

use super::wasm::Fault;

/// The causes, as [`Fault::label`] names them.
const CAUSES: [&str; 8] = [
    "trap",
    "deadline",
    "memory",
    "stack_overflow",
    "bad_output",
    "refused",
    "busy",
    "breaker_open",
];

/// Running counts.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    faults: [AtomicU64; CAUSES.len()],
}

/// Counts at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CountersSnapshot {
    /// Requests, degraded ones included.
    pub requests: u64,
    /// Degraded requests by cause; every cause is listed.
    pub faults: Vec<(&'static str, u64)>,
}

impl CountersSnapshot {
    /// Requests that were degraded.
    pub fn degraded(&self) -> u64 {
        self.faults.iter().map(|(_, count)| count).sum()
    }
}

impl Counters {
    pub(super) fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn fault(&self, cause: &Fault) {
        let index = CAUSES.iter().position(|label| *label == cause.label());
        self.faults[index.expect("every fault has a counter")].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let counts = CAUSES
            .iter()
            .zip(&self.faults)
            .map(|(label, count)| (*label, count.load(Ordering::Relaxed)));
        CountersSnapshot {
            requests: self.requests.load(Ordering::Relaxed),
            faults: counts.collect(),
        }
    }
}
