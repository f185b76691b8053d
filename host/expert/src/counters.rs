//! What came of an expert's requests: counts and times for metrics, and faults
//! in the log, once in a while.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::wasm::{Call, ExpertFault, Fault};

/// The causes, as [`Fault::label`] names them.
const CAUSES: [&str; 9] = [
    "trap",
    "deadline",
    "memory",
    "table",
    "stack_overflow",
    "bad_output",
    "refused",
    "busy",
    "breaker_open",
];

/// How often a fault of one call and cause is told, at most.
const TELL: Duration = Duration::from_secs(10);

/// Requests over which the degraded share is told.
const LATELY: u64 = 256;

/// Running counts.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    network_ns: AtomicU64,
    faults: [AtomicU64; CAUSES.len()],
    lately: Mutex<Lately>,
    told: Mutex<HashMap<(Call, &'static str), Told>>,
}

/// The last requests, a bit each.
#[derive(Debug, Default)]
struct Lately {
    seen: u64,
    degraded: [u64; LATELY as usize / 64],
}

#[derive(Debug, Clone, Copy)]
struct Told {
    at: Instant,
    since: u64,
}

/// Counts at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct CountersSnapshot {
    /// Requests, degraded ones included.
    pub requests: u64,
    /// Time in the host's run of the network, its inputs included.
    pub network: Duration,
    /// Degraded requests by cause; every cause is listed.
    pub faults: Vec<(&'static str, u64)>,
    /// The share of the last 256 requests that were degraded; none before the first.
    pub degraded_lately: Option<f64>,
}

impl CountersSnapshot {
    /// Requests that were degraded.
    pub fn degraded(&self) -> u64 {
        self.faults.iter().map(|(_, count)| count).sum()
    }
}

impl Counters {
    pub(super) fn network(&self, took: Duration) {
        self.network_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// A request ended well.
    pub(super) fn ranked(&self) {
        self.request(false);
    }

    /// A request ended in a fault.
    pub(super) fn fault(&self, cause: &Fault) {
        self.request(true);
        let index = CAUSES.iter().position(|label| *label == cause.label());
        self.faults[index.expect("every fault has a counter")].fetch_add(1, Ordering::Relaxed);
    }

    fn request(&self, degraded: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        let at = lately.seen % LATELY;
        let (word, bit) = ((at / 64) as usize, 1 << (at % 64));
        match degraded {
            true => lately.degraded[word] |= bit,
            false => lately.degraded[word] &= !bit,
        }
        lately.seen += 1;
    }

    /// Tells of a fault in the log, with the guest's functions, unless one like it was told a moment ago: a plugin that
    /// fails on every request must not fill the log.
    pub(super) fn tell(&self, fault: &ExpertFault, now: Instant) {
        if let Some(since) = self.telling(fault, now) {
            let (plugin, cause) = (fault.plugin.as_str(), fault.cause.label());
            let backtrace = fault.backtrace();
            tracing::warn!(plugin, cause, since, "{fault}{backtrace}");
        }
    }

    /// How many faults like it there were since the last that was told, if this one is to be.
    fn telling(&self, fault: &ExpertFault, now: Instant) -> Option<u64> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let told = told.entry((fault.call, fault.cause.label()));
        let mut first = false;
        let told = told.or_insert_with(|| {
            first = true;
            Told { at: now, since: 0 }
        });
        told.since += 1;
        if first || now.saturating_duration_since(told.at) >= TELL {
            told.at = now;
            return Some(std::mem::take(&mut told.since));
        }
        None
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let counts = CAUSES
            .iter()
            .zip(&self.faults)
            .map(|(label, count)| (*label, count.load(Ordering::Relaxed)));
        let lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
        let degraded: u32 = lately.degraded.iter().map(|word| word.count_ones()).sum();
        CountersSnapshot {
            requests: self.requests.load(Ordering::Relaxed),
            network: Duration::from_nanos(self.network_ns.load(Ordering::Relaxed)),
            faults: counts.collect(),
            degraded_lately: (lately.seen > 0)
                .then(|| f64::from(degraded) / lately.seen.min(LATELY) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_degraded_share_forgets_old_requests() {
        let counters = Counters::default();
        assert_eq!(counters.snapshot().degraded_lately, None);
        counters.fault(&Fault::Open);
        counters.ranked();
        assert_eq!(counters.snapshot().degraded_lately, Some(0.5));
        (0..LATELY).for_each(|_| counters.fault(&Fault::StackOverflow));
        assert_eq!(counters.snapshot().degraded_lately, Some(1.0));
        (0..LATELY).for_each(|_| counters.ranked());
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.degraded_lately, Some(0.0));
        assert_eq!((snapshot.requests, snapshot.degraded()), (2 + 2 * LATELY, 1 + LATELY));
    }

    #[test]
    fn a_fault_on_every_request_is_told_once_in_a_while_and_another_cause_at_once() {
        let counters = Counters::default();
        let fault =
            |cause| ExpertFault { plugin: "p".into(), call: Call::Rank, cause, trace: Vec::new() };
        let (trap, start) = (fault(Fault::Trap("x".into())), Instant::now());
        assert_eq!(counters.telling(&trap, start), Some(1));
        assert_eq!(counters.telling(&trap, start + TELL / 2), None);
        assert_eq!(counters.telling(&fault(Fault::Open), start), Some(1));
        assert_eq!(counters.telling(&trap, start + TELL), Some(2));
    }
}
