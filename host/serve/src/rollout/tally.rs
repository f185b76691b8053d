//! What a version did: requests, faults and times, counted on the path of requests by atomics alone, and compared
//! over windows by who takes snapshots.

use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Buckets an octave: a quantile is known to a tenth.
const STEPS: u32 = 8;

/// Octaves from a microsecond: to about 17 minutes.
const OCTAVES: u32 = 30;

/// Buckets of times.
const BUCKETS: usize = (STEPS * OCTAVES) as usize;

/// The last faults that are kept in words.
const FAULTS: usize = 32;

/// Running counts of one version.
#[derive(Debug)]
pub struct Tally {
    requests: AtomicU64,
    faults: AtomicU64,
    times: [AtomicU64; BUCKETS],
    said: Mutex<VecDeque<(i64, String)>>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            requests: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            times: std::array::from_fn(|_| AtomicU64::new(0)),
            said: Mutex::default(),
        }
    }
}

/// Counts at one moment, or between two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    /// Requests, those with faults included.
    pub requests: u64,
    /// Requests at which it faulted.
    pub faults: u64,
    times: Vec<u64>,
}

impl Tally {
    /// Counts a request.
    pub fn add(&self, took: Duration, faulted: bool) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.faults.fetch_add(u64::from(faulted), Ordering::Relaxed);
        self.times[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps what a fault said; the oldest is let go.
    pub fn tell(&self, at_ms: i64, fault: String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == FAULTS {
            said.pop_front();
        }
        said.push_back((at_ms, fault));
    }

    /// What the last faults said, and when (milliseconds since the epoch), oldest first.
    pub fn said(&self) -> Vec<(i64, String)> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// What was counted until now.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            requests: read(&self.requests),
            faults: read(&self.faults),
            times: self.times.iter().map(read).collect(),
        }
    }
}

impl Counts {
    /// What came after `earlier`. Counts that began anew in between are taken from there.
    pub fn since(&self, earlier: &Counts) -> Counts {
        if earlier.requests > self.requests {
            return self.clone();
        }
        let times = self.times.iter().zip(&earlier.times);
        Counts {
            requests: self.requests - earlier.requests,
            faults: self.faults.saturating_sub(earlier.faults),
            times: times.map(|(now, then)| now.saturating_sub(*then)).collect(),
        }
    }

    /// The time below which a share of the requests was, in microseconds (the middle of its bucket).
    pub fn quantile_us(&self, share: f64) -> Option<f64> {
        let all: u64 = self.times.iter().sum();
        let wanted = ((all as f64 * share).ceil() as u64).max(1);
        let mut until = 0;
        let found = self.times.iter().position(|count| {
            until += count;
            until >= wanted
        });
        found.map(|at| 2f64.powf((at as f64 + 0.5) / f64::from(STEPS)))
    }
}

fn bucket(took: Duration) -> usize {
    let us = took.as_secs_f64() * 1e6;
    let at = (us.max(1.0).log2() * f64::from(STEPS)) as usize;
    at.min(BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_known_to_a_tenth_and_windows_are_differences() {
        let tally = Tally::default();
        for us in 1..=1000 {
            tally.add(Duration::from_micros(us), false);
        }
        let first = tally.counts();
        for (share, us) in [(0.5, 500.0), (0.99, 990.0)] {
            let found = first.quantile_us(share).unwrap();
            assert!((found / us - 1.0).abs() < 0.1, "{found} for {us}");
        }
        tally.add(Duration::from_secs(2), true);
        let later = tally.counts().since(&first);
        assert_eq!((later.requests, later.faults), (1, 1));
        assert!((later.quantile_us(0.99).unwrap() / 2e6 - 1.0).abs() < 0.1);
        assert_eq!(later.since(&later).quantile_us(0.5), None);
        for at in 0..100 {
            tally.tell(at, format!("fault {at}"));
        }
        assert_eq!(tally.said().len(), FAULTS);
    }
}
