//! Statistics of one version: requests, faults and times. Requests only update atomics; readers
//! take snapshots and compare them.

use std::{
    collections::VecDeque,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_expert::BreakerConfig;

use crate::{rollout::evaluation::StepEvaluation, threads::lock};

/// Buckets per octave: quantiles are exact to a tenth.
const STEPS: u32 = 8;

/// Octaves from one microsecond: up to about 17 minutes.
const OCTAVES: u32 = 30;

/// Number of buckets of times.
const BUCKETS: usize = (STEPS * OCTAVES) as usize;

/// Number of fault messages that are kept.
const FAULTS: usize = 32;

/// Running counts of one version.
#[derive(Debug)]
pub struct ArmStats {
    faults: AtomicU64,
    times: [AtomicU64; BUCKETS],
    faults_text: Mutex<VecDeque<(i64, String)>>,
}

impl Default for ArmStats {
    fn default() -> Self {
        Self {
            faults: AtomicU64::new(0),
            times: std::array::from_fn(|_| AtomicU64::new(0)),
            faults_text: Mutex::default(),
        }
    }
}

/// Counts at one moment, or between two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArmCounts {
    /// Requests, including those with faults.
    pub requests: u64,
    /// Requests with a fault.
    pub faults: u64,
    times: Vec<u64>,
}

impl ArmStats {
    /// Counts a request with its time in the expert.
    pub fn add(&self, took: Duration, faulted: bool) {
        self.faults.fetch_add(u64::from(faulted), Ordering::Relaxed);
        self.times[bucket(took)].fetch_add(1, Ordering::Relaxed);
    }

    /// Keeps the message of a fault; the oldest is dropped.
    pub fn add_fault(&self, at_ms: i64, fault: String) {
        let mut recent = lock(&self.faults_text);
        if recent.len() == FAULTS {
            recent.pop_front();
        }
        recent.push_back((at_ms, fault));
    }

    /// The newest fault messages with their times (milliseconds since the epoch), oldest first.
    pub fn recent_faults(&self) -> Vec<(i64, String)> {
        lock(&self.faults_text).iter().cloned().collect()
    }

    /// The text of the last fault.
    pub fn last_fault(&self) -> Option<String> {
        let recent = lock(&self.faults_text);
        recent.back().map(|(_, fault)| fault.clone())
    }

    /// The counts until now.
    pub fn counts(&self) -> ArmCounts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let times: Vec<u64> = self.times.iter().map(read).collect();
        ArmCounts { requests: times.iter().sum(), faults: read(&self.faults), times }
    }
}

impl ArmCounts {
    /// The counts after `earlier`. Counts that were reset in between are returned whole.
    pub fn since(&self, earlier: &ArmCounts) -> ArmCounts {
        if earlier.requests > self.requests {
            return self.clone();
        }
        let times = self.times.iter().zip(&earlier.times);
        ArmCounts {
            requests: self.requests - earlier.requests,
            faults: self.faults.saturating_sub(earlier.faults),
            times: times.map(|(now, then)| now.saturating_sub(*then)).collect(),
        }
    }

    /// The time that a share of the requests stayed below, in microseconds (middle of its bucket).
    pub fn quantile_us(&self, share: f64) -> Option<f64> {
        let wanted = ((self.requests as f64 * share).ceil() as u64).max(1);
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

/// Snapshots per window.
const SNAPSHOTS: u32 = 30;

/// One step of one rollout, as this process has seen it.
pub(super) struct StepWatch {
    /// When the step was first looked at.
    pub(super) began: Instant,
    /// How long the step lasted before that, as it was saved: 0 but after a restart.
    lasted_before: Duration,
    /// The version.
    pub(super) own: StatsWindow,
    /// The version before.
    pub(super) before: StatsWindow,
    /// What the plugin says of its quality.
    pub(super) evaluation: StepEvaluation,
}

impl StepWatch {
    /// Begins to look at a step that has `lasted_before`, with a window of `window_s` seconds;
    /// `breaker` limits calls of `evaluate`.
    pub(super) fn new(
        now: Instant,
        lasted_before: Duration,
        window_s: u64,
        breaker: BreakerConfig,
    ) -> Self {
        let window = Duration::from_secs(window_s);
        let windowed = || StatsWindow { window, first: None, snapshots: VecDeque::new() };
        let evaluation = StepEvaluation::new(breaker);
        Self { began: now, lasted_before, own: windowed(), before: windowed(), evaluation }
    }

    /// How long the step has lasted while a process looked. No wall clock has a part in it.
    pub(super) fn lasted(&self, now: Instant) -> Duration {
        self.lasted_before + (now - self.began)
    }
}

/// A version's counts over a window.
pub(super) struct StatsWindow {
    window: Duration,
    first: Option<ArmCounts>,
    snapshots: VecDeque<(Instant, ArmCounts)>,
}

/// Counts of a version.
pub(super) struct WindowStats {
    /// Since the step was first looked at.
    pub(super) whole: ArmCounts,
    /// Over the window.
    pub(super) window: ArmCounts,
}

impl StatsWindow {
    /// Takes a snapshot if one is due, and returns the counts.
    pub(super) fn update(&mut self, now: Instant, tally: &ArmStats) -> WindowStats {
        let counts = tally.counts();
        let first = self.first.get_or_insert_with(|| counts.clone());
        // The newest one from before the window stays: what came while nobody looked is in it.
        while self.snapshots.get(1).is_some_and(|(at, _)| now - *at >= self.window) {
            self.snapshots.pop_front();
        }
        let due = self.window / SNAPSHOTS;
        if self.snapshots.back().is_none_or(|(at, _)| now - *at >= due) {
            self.snapshots.push_back((now, counts.clone()));
        }
        let oldest = self.snapshots.front().map_or(&counts, |(_, counts)| counts);
        WindowStats { whole: counts.since(first), window: counts.since(oldest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_known_to_a_tenth_and_windows_are_differences() {
        let tally = ArmStats::default();
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
            tally.add_fault(at, format!("fault {at}"));
        }
        assert_eq!(tally.recent_faults().len(), FAULTS);
    }

    #[test]
    fn a_window_forgets_and_the_whole_does_not() {
        let (tally, start) = (ArmStats::default(), Instant::now());
        let mut watched = StepWatch::new(start, Duration::ZERO, 60, BreakerConfig::default()).own;
        watched.update(start, &tally);
        for second in 1..=600 {
            tally.add(Duration::from_millis(1), second <= 10);
            watched.update(start + Duration::from_secs(second), &tally);
        }
        let looked = watched.update(start + Duration::from_secs(600), &tally);
        assert_eq!((looked.whole.requests, looked.whole.faults), (600, 10));
        assert_eq!(looked.window.faults, 0);
        assert!((55..=65).contains(&looked.window.requests), "{}", looked.window.requests);
        assert!(watched.snapshots.len() <= SNAPSHOTS as usize + 1);
    }

    #[test]
    fn what_came_while_nobody_looked_is_in_the_window() {
        let (tally, start) = (ArmStats::default(), Instant::now());
        let mut watched = StepWatch::new(start, Duration::ZERO, 60, BreakerConfig::default()).own;
        watched.update(start, &tally);
        tally.add(Duration::from_millis(1), true);
        let looked = watched.update(start + Duration::from_secs(600), &tally);
        assert_eq!((looked.window.requests, looked.window.faults), (1, 1));
    }

    #[test]
    fn a_step_lasts_by_the_steady_clock_and_goes_on_after_a_restart() {
        let (start, before) = (Instant::now(), Duration::from_secs(100));
        let watch = StepWatch::new(start, before, 60, BreakerConfig::default());
        assert_eq!(watch.lasted(start), before);
        assert_eq!(watch.lasted(start + Duration::from_secs(30)), Duration::from_secs(130));
    }
}
