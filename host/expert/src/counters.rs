//! Counts and times of an expert's requests for metrics, and a rate-limited log of its faults.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
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

/// The shortest time between two log lines about faults of the same call and cause.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Requests over which the recent degraded share is measured.
const RECENT: u64 = 256;

/// The running counts of one expert.
#[derive(Debug, Default)]
pub struct ExpertCounters {
    requests: AtomicU64,
    network_ns: AtomicU64,
    faults: [AtomicU64; CAUSES.len()],
    recent: Mutex<RecentRequests>,
    reported: Mutex<HashMap<(Call, &'static str), ReportedFault>>,
}

/// The results of the last requests in a ring of bits.
#[derive(Debug, Default)]
struct RecentRequests {
    seen: u64,
    /// A bit is set if its request was degraded.
    degraded: [u64; RECENT as usize / 64],
}

/// The last log line about faults of one call and cause.
#[derive(Debug, Clone, Copy)]
struct ReportedFault {
    at: Instant,
    faults_since: u64,
}

/// The counts at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct CountersSnapshot {
    /// The number of requests, degraded ones included.
    pub requests: u64,
    /// Total time of the host's runs of the network, with building their inputs.
    pub network: Duration,
    /// The number of degraded requests by cause, with all causes.
    pub faults: Vec<(&'static str, u64)>,
    /// The share of the last 256 requests that were degraded; none before the first request.
    pub degraded_lately: Option<f64>,
}

impl CountersSnapshot {
    /// The number of degraded requests.
    pub fn degraded(&self) -> u64 {
        self.faults.iter().map(|(_, count)| count).sum()
    }
}

impl ExpertCounters {
    pub(super) fn network(&self, took: Duration) {
        self.network_ns.fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
    }

    /// Counts a request that the expert answered.
    pub(super) fn ranked(&self) {
        self.request(false);
    }

    /// Counts a request that ended in a fault.
    pub(super) fn fault(&self, cause: &Fault) {
        self.request(true);
        let index = CAUSES.iter().position(|label| *label == cause.label());
        self.faults[index.expect("every fault has a counter")].fetch_add(1, Ordering::Relaxed);
    }

    fn request(&self, is_degraded: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let at = recent.seen % RECENT;
        let (word, bit) = ((at / 64) as usize, 1 << (at % 64));
        recent.degraded[word] &= !bit;
        if is_degraded {
            recent.degraded[word] |= bit;
        }
        recent.seen += 1;
    }

    /// Logs a fault with the guest's functions, unless a fault of the same call and cause was
    /// logged in the last ten seconds: a plugin that fails on every request must not fill the log.
    pub(super) fn log(&self, fault: &ExpertFault, now: Instant) {
        if let Some(since) = self.faults_to_report(fault, now) {
            let (plugin, cause) = (fault.plugin.as_str(), fault.cause.label());
            let backtrace = fault.backtrace();
            tracing::warn!(plugin, cause, since, "{fault}{backtrace}");
        }
    }

    /// The number of faults of this call and cause since the last log line, if it is time for one.
    fn faults_to_report(&self, fault: &ExpertFault, now: Instant) -> Option<u64> {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        match reported.entry((fault.call, fault.cause.label())) {
            Entry::Vacant(entry) => {
                entry.insert(ReportedFault { at: now, faults_since: 0 });
                Some(1)
            }
            Entry::Occupied(mut entry) => {
                let last = entry.get_mut();
                last.faults_since += 1;
                let is_due = now.saturating_duration_since(last.at) >= LOG_EVERY;
                is_due.then(|| {
                    last.at = now;
                    std::mem::take(&mut last.faults_since)
                })
            }
        }
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let counts = CAUSES
            .iter()
            .zip(&self.faults)
            .map(|(label, count)| (*label, count.load(Ordering::Relaxed)));
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let degraded: u32 = recent.degraded.iter().map(|word| word.count_ones()).sum();
        CountersSnapshot {
            requests: self.requests.load(Ordering::Relaxed),
            network: Duration::from_nanos(self.network_ns.load(Ordering::Relaxed)),
            faults: counts.collect(),
            degraded_lately: (recent.seen > 0)
                .then(|| f64::from(degraded) / recent.seen.min(RECENT) as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_degraded_share_forgets_old_requests() {
        let counters = ExpertCounters::default();
        assert_eq!(counters.snapshot().degraded_lately, None);
        counters.fault(&Fault::Open);
        counters.ranked();
        assert_eq!(counters.snapshot().degraded_lately, Some(0.5));
        (0..RECENT).for_each(|_| counters.fault(&Fault::StackOverflow));
        assert_eq!(counters.snapshot().degraded_lately, Some(1.0));
        (0..RECENT).for_each(|_| counters.ranked());
        let snapshot = counters.snapshot();
        assert_eq!(snapshot.degraded_lately, Some(0.0));
        assert_eq!((snapshot.requests, snapshot.degraded()), (2 + 2 * RECENT, 1 + RECENT));
    }

    #[test]
    fn a_fault_on_every_request_is_logged_once_in_a_while_and_another_cause_at_once() {
        let counters = ExpertCounters::default();
        let fault = |cause| ExpertFault::new("p", Call::Rank, cause);
        let (trap, start) = (fault(Fault::Trap("x".into())), Instant::now());
        assert_eq!(counters.faults_to_report(&trap, start), Some(1));
        assert_eq!(counters.faults_to_report(&trap, start + LOG_EVERY / 2), None);
        assert_eq!(counters.faults_to_report(&fault(Fault::Open), start), Some(1));
        assert_eq!(counters.faults_to_report(&trap, start + LOG_EVERY), Some(2));
    }
}
