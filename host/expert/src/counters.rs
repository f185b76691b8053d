//! Counts and times of an expert's requests for metrics, and a rate-limited log of its faults.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{
    AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};
use std::time::{Duration, Instant};

use super::lock;
use super::wasm::{Call, ExpertFault, Fault};

/// The causes, as [`Fault::label`] names them.
const CAUSES: [&str; 10] = [
    "trap",
    "deadline",
    "memory",
    "table",
    "stack_overflow",
    "bad_output",
    "refused",
    "busy",
    "breaker_open",
    "user_set_aside",
];

/// The shortest time between two log lines about faults of the same call and cause.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// Requests over which the recent degraded share is measured.
const RECENT: u64 = 256;

/// The running counts of one expert. Who reads them holds up no request.
#[derive(Debug, Default)]
pub struct ExpertCounters {
    requests: AtomicU64,
    network_ns: AtomicU64,
    faults: [AtomicU64; CAUSES.len()],
    /// The results of the last requests in a ring: a bit is set if its request was degraded.
    degraded: [AtomicU64; RECENT as usize / 64],
    /// Only requests that fault take it.
    reported: Mutex<HashMap<(Call, &'static str), ReportedFault>>,
}

/// The last log line about faults of one call and cause.
#[derive(Debug, Clone, Copy, Default)]
struct ReportedFault {
    at: Option<Instant>,
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
        self.network_ns.fetch_add(took.as_nanos() as u64, Relaxed);
    }

    /// Counts a request that the expert answered.
    pub(super) fn ranked(&self) {
        self.request(false);
    }

    /// Counts a request that ended in a fault.
    pub(super) fn fault(&self, cause: &Fault) {
        let index = CAUSES.iter().position(|label| *label == cause.label());
        self.request(true);
        self.faults[index.expect("every fault has a counter")].fetch_add(1, Relaxed);
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
        let mut reported = lock(&self.reported);
        let last = reported.entry((fault.call, fault.cause.label())).or_default();
        last.faults_since += 1;
        if last.at.is_some_and(|at| now.saturating_duration_since(at) < LOG_EVERY) {
            return None;
        }
        last.at = Some(now);
        Some(std::mem::take(&mut last.faults_since))
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        let degraded = self.degraded.iter().map(|word| word.load(Acquire).count_ones());
        let degraded: u32 = degraded.sum();
        // Counted before the bit is set, so the share is at most 1.
        let requests = self.requests.load(Relaxed);
        let faults = self.faults.iter().map(|count| count.load(Relaxed));
        CountersSnapshot {
            requests,
            network: Duration::from_nanos(self.network_ns.load(Relaxed)),
            faults: CAUSES.into_iter().zip(faults).collect(),
            degraded_lately: (requests > 0)
                .then(|| f64::from(degraded) / requests.min(RECENT) as f64),
        }
    }

    fn request(&self, is_degraded: bool) {
        let at = self.requests.fetch_add(1, Relaxed) % RECENT;
        let (word, bit) = (&self.degraded[(at / 64) as usize], 1 << (at % 64));
        if is_degraded {
            word.fetch_or(bit, Release);
        } else {
            word.fetch_and(!bit, Release);
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
