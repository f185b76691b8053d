//! A circuit breaker: after repeated faults a plugin is not called for a while. Otherwise a plugin
//! that always runs into its deadline would delay every request by that deadline.
//!
//! It opens after some faults in a row, or if faults take more than a share of one thread's time,
//! in a row or not. Each time that it opens soon after it closed, it stays open for longer.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::lock;

/// The period over which [`BreakerConfig::lost_share`] is measured.
const LOST_WINDOW: Duration = Duration::from_secs(10);

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct BreakerConfig {
    /// Consecutive faults that open it.
    pub faults: u32,
    /// The breaker opens when calls that end in faults take this share of one thread's time over
    /// ten seconds.
    pub lost_share: f64,
    /// How long it stays open before one call may try again, in milliseconds.
    pub open_ms: u64,
    /// The upper bound of `open_ms`, which doubles each time that the breaker opens again before it
    /// was closed for as long as it had been open.
    pub open_max_ms: u64,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig { faults: 5, lost_share: 0.01, open_ms: 5_000, open_max_ms: 300_000 }
    }
}

/// Whether a breaker lets calls pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// All calls pass.
    Closed,
    /// All calls are refused.
    Open,
    /// One call runs as a test; the others are refused.
    HalfOpen,
}

impl BreakerState {
    /// The state as a metrics label.
    pub fn label(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half_open",
        }
    }
}

/// Counts the faults of one plugin and their cost.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    counts: Mutex<FaultCounts>,
}

#[derive(Debug, Default)]
struct FaultCounts {
    consecutive: u32,
    open_until: Option<Instant>,
    is_testing: bool,
    /// How long the breaker is or was open, in milliseconds; 0 before it opened at all.
    open_ms: u64,
    closed_at: Option<Instant>,
    /// The cost of failed calls in seconds, less what was allowed since, at the time of the last.
    lost_s: f64,
    lost_at: Option<Instant>,
}

impl Breaker {
    /// A breaker that is closed and has counted no fault.
    pub fn new(config: BreakerConfig) -> Breaker {
        Breaker { config, counts: Mutex::default() }
    }

    /// Whether a call may go ahead at `now`. After the open time one call may, and its result,
    /// which the caller reports, decides.
    pub fn admit(&self, now: Instant) -> bool {
        let mut counts = lock(&self.counts);
        match counts.open_until {
            None => true,
            Some(until) if now < until => false,
            Some(_) => {
                // If the result of this call is never reported, the next test is after another
                // open time.
                counts.open_until = Some(now + Duration::from_millis(counts.open_ms));
                counts.is_testing = true;
                true
            }
        }
    }

    /// A call succeeded at `now`: the breaker closes.
    pub fn success(&self, now: Instant) {
        let mut counts = lock(&self.counts);
        counts.consecutive = 0;
        if counts.open_until.take().is_some() {
            (counts.is_testing, counts.closed_at) = (false, Some(now));
        }
    }

    /// A call failed at `now`: the breaker may open. `cost` is CPU time for a short call, because a
    /// busy machine is not the plugin's fault.
    pub fn fault(&self, now: Instant, cost: Duration) {
        let mut counts = lock(&self.counts);
        counts.consecutive = counts.consecutive.saturating_add(1);
        let max_lost_s = self.config.lost_share * LOST_WINDOW.as_secs_f64();
        let lost_too_much = counts.add_lost_time(now, cost, self.config.lost_share) >= max_lost_s;
        if counts.is_testing || counts.consecutive >= self.config.faults || lost_too_much {
            counts.open(now, &self.config);
        }
    }

    /// Whether it lets calls pass at present.
    pub fn state(&self) -> BreakerState {
        let counts = lock(&self.counts);
        match (counts.open_until, counts.is_testing) {
            (None, _) => BreakerState::Closed,
            (Some(_), true) => BreakerState::HalfOpen,
            (Some(_), false) => BreakerState::Open,
        }
    }
}

impl FaultCounts {
    /// Adds a failed call and returns the present lost time in seconds.
    fn add_lost_time(&mut self, now: Instant, cost: Duration, allowed_share: f64) -> f64 {
        let last = self.lost_at.replace(now).unwrap_or(now);
        let elapsed_s = now.saturating_duration_since(last).as_secs_f64();
        self.lost_s = (self.lost_s - elapsed_s * allowed_share).max(0.0) + cost.as_secs_f64();
        self.lost_s
    }

    fn open(&mut self, now: Instant, config: &BreakerConfig) {
        // Faults of calls that were already running when it opened do not count again.
        if self.open_until.is_some() && !self.is_testing {
            return;
        }
        let open_time = Duration::from_millis(self.open_ms);
        let was_closed_long =
            self.closed_at.is_some_and(|at| now.saturating_duration_since(at) >= open_time);
        self.open_ms = match self.open_ms {
            0 => config.open_ms,
            _ if was_closed_long && !self.is_testing => config.open_ms,
            open_ms => open_ms.saturating_mul(2).min(config.open_max_ms.max(config.open_ms)),
        };
        self.open_until = Some(now + Duration::from_millis(self.open_ms));
        (self.is_testing, self.consecutive) = (false, 0);
        // The open time makes up for the lost time.
        self.lost_s = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn opens_after_repeated_faults_and_lets_one_call_try() {
        let config = BreakerConfig { faults: 2, open_ms: 100, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        breaker.fault(start, Duration::from_millis(0));
        assert!(breaker.admit(start));
        breaker.fault(start, Duration::from_millis(0));
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!breaker.admit(after(start, 99)));
        let later = after(start, 100);
        assert!(breaker.admit(later), "one call tries");
        assert!(!breaker.admit(later), "and only one");
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.fault(later, Duration::from_millis(0));
        assert!(!breaker.admit(after(later, 199)), "a failed try opens it for twice as long");
        assert!(breaker.admit(after(later, 200)));
        breaker.success(after(later, 200));
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.fault(after(later, 201), Duration::from_millis(0));
        assert!(breaker.admit(after(later, 201)), "a success resets the count");
    }

    #[test]
    fn faults_that_take_long_open_it_though_calls_between_go_well() {
        let config = BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        // 50 ms of every 100: 200 ms are allowed in ten seconds.
        for round in 0..4 {
            breaker.fault(after(start, 100 * round), Duration::from_millis(50));
            breaker.success(after(start, 100 * round + 50));
            assert_eq!(breaker.state(), BreakerState::Closed, "round {round}");
        }
        breaker.fault(after(start, 400), Duration::from_millis(50));
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn few_long_faults_and_many_short_ones_leave_it_closed() {
        let breaker = Breaker::new(BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() });
        let start = Instant::now();
        for second in 0..60 {
            // A hundredth of a second's thread, and a success beside each.
            breaker.fault(after(start, 1000 * second), Duration::from_millis(10));
            breaker.success(after(start, 1000 * second + 10));
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn rests_grow_to_a_bound_and_a_long_good_time_makes_them_short_again() {
        let config =
            BreakerConfig { faults: 1, open_ms: 100, open_max_ms: 400, ..Default::default() };
        let breaker = Breaker::new(config);
        let mut now = Instant::now();
        breaker.fault(now, Duration::from_millis(0));
        for rest_ms in [100, 200, 400, 400] {
            assert!(!breaker.admit(after(now, rest_ms - 1)), "{rest_ms} ms");
            now = after(now, rest_ms);
            assert!(breaker.admit(now), "{rest_ms} ms");
            breaker.fault(now, Duration::from_millis(0));
        }
        now = after(now, 400);
        assert!(breaker.admit(now));
        breaker.success(now);
        now = after(now, 400);
        breaker.fault(now, Duration::from_millis(0));
        assert!(breaker.admit(after(now, 100)), "it was closed for as long as it had been open");
    }
}
