//! A circuit breaker: after repeated faults a plugin is left alone for a while,
//! so that one that runs into its deadline each time does not cost every
//! request that deadline. It does not decide what is served instead.
//!
//! It opens by count, after some faults in a row, and by time, where faults take more than a share of a
//! thread, in a row or not. A plugin that opens it again and again rests for longer and longer.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// The time over which lost time counts.
const LOST_OVER: Duration = Duration::from_secs(10);

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct BreakerConfig {
    /// Consecutive faults that open it.
    pub faults: u32,
    /// The share of one thread's time, over ten seconds, that calls which end in faults may not take: it opens at that.
    pub lost_share: f64,
    /// How long it stays open before one call may try again, in milliseconds.
    pub open_ms: u64,
    /// The longest that it stays open, in milliseconds: each time that it opens again before it was closed for as long as
    /// it was open, it stays open for twice as long.
    pub open_max_ms: u64,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig { faults: 5, lost_share: 0.01, open_ms: 5_000, open_max_ms: 300_000 }
    }
}

/// What a breaker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakerState {
    /// Calls pass.
    Closed,
    /// Calls are refused.
    Open,
    /// One call is out to try.
    HalfOpen,
}

impl BreakerState {
    /// As it stands in metrics.
    pub fn label(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::Open => "open",
            BreakerState::HalfOpen => "half_open",
        }
    }
}

/// A call's end, as a breaker counts it.
#[derive(Debug, Clone, Copy)]
pub struct Lost {
    /// When it ended.
    pub at: Instant,
    /// What it had cost: the processor's time, as long as that is short; that a machine was busy with others is not the
    /// plugin's fault.
    pub took: Duration,
}

/// Counts faults of one plugin, and the time that they took.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    consecutive: u32,
    open_until: Option<Instant>,
    probing: bool,
    /// How long it is or was open, in milliseconds; 0 before it ever was.
    rest_ms: u64,
    closed_at: Option<Instant>,
    lost: Option<Leak>,
}

/// Lost time, which drains at the allowed rate.
#[derive(Debug, Clone, Copy)]
struct Leak {
    at: Instant,
    held_s: f64,
}

impl Breaker {
    /// A closed breaker.
    pub fn new(config: BreakerConfig) -> Breaker {
        Breaker { config, inner: Mutex::default() }
    }

    /// Whether a call may go ahead at `now`. After the open time one call is
    /// let through, and its outcome, which the caller reports, decides.
    pub fn admit(&self, now: Instant) -> bool {
        let mut inner = self.lock();
        match inner.open_until {
            None => true,
            Some(until) if now < until => false,
            Some(_) => {
                // The others wait another while; should this call's outcome be
                // lost, the next one tries then.
                inner.open_until = Some(now + Duration::from_millis(inner.rest_ms));
                inner.probing = true;
                true
            }
        }
    }

    /// A call went well at `now`: the breaker closes.
    pub fn success(&self, now: Instant) {
        let mut inner = self.lock();
        inner.consecutive = 0;
        if inner.open_until.take().is_some() {
            (inner.probing, inner.closed_at) = (false, Some(now));
        }
    }

    /// A call failed.
    pub fn fault(&self, lost: Lost) {
        let mut inner = self.lock();
        inner.consecutive = inner.consecutive.saturating_add(1);
        let most_s = self.config.lost_share * LOST_OVER.as_secs_f64();
        let too_much = inner.lose(lost, self.config.lost_share) >= most_s;
        if inner.probing || inner.consecutive >= self.config.faults || too_much {
            inner.open(lost.at, &self.config);
        }
    }

    /// The state now.
    pub fn state(&self) -> BreakerState {
        let inner = self.lock();
        match (inner.open_until, inner.probing) {
            (None, _) => BreakerState::Closed,
            (Some(_), true) => BreakerState::HalfOpen,
            (Some(_), false) => BreakerState::Open,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // A panic elsewhere cannot leave these counters half-written.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Inner {
    /// Seconds that are lost and not yet made up for.
    fn lose(&mut self, lost: Lost, share: f64) -> f64 {
        let before = self.lost.unwrap_or(Leak { at: lost.at, held_s: 0.0 });
        let drained_s = lost.at.saturating_duration_since(before.at).as_secs_f64() * share;
        let held_s = (before.held_s - drained_s).max(0.0) + lost.took.as_secs_f64();
        self.lost = Some(Leak { at: lost.at, held_s });
        held_s
    }

    fn open(&mut self, now: Instant, config: &BreakerConfig) {
        // Calls that were under way when it opened say nothing new.
        if self.open_until.is_some() && !self.probing {
            return;
        }
        let rest = Duration::from_millis(self.rest_ms);
        let closed_long =
            self.closed_at.is_some_and(|at| now.saturating_duration_since(at) >= rest);
        self.rest_ms = match self.rest_ms {
            0 => config.open_ms,
            _ if closed_long && !self.probing => config.open_ms,
            rest_ms => rest_ms.saturating_mul(2).min(config.open_max_ms.max(config.open_ms)),
        };
        self.open_until = Some(now + Duration::from_millis(self.rest_ms));
        (self.probing, self.consecutive) = (false, 0);
        // What opened it is paid for by the rest.
        self.lost = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    fn lost(at: Instant, took_ms: u64) -> Lost {
        Lost { at, took: Duration::from_millis(took_ms) }
    }

    #[test]
    fn opens_after_repeated_faults_and_lets_one_call_try() {
        let config = BreakerConfig { faults: 2, open_ms: 100, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        breaker.fault(lost(start, 0));
        assert!(breaker.admit(start));
        breaker.fault(lost(start, 0));
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!breaker.admit(after(start, 99)));
        let later = after(start, 100);
        assert!(breaker.admit(later), "one call tries");
        assert!(!breaker.admit(later), "and only one");
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.fault(lost(later, 0));
        assert!(!breaker.admit(after(later, 199)), "a failed try opens it for twice as long");
        assert!(breaker.admit(after(later, 200)));
        breaker.success(after(later, 200));
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.fault(lost(after(later, 201), 0));
        assert!(breaker.admit(after(later, 201)), "a success resets the count");
    }

    #[test]
    fn faults_that_take_long_open_it_though_calls_between_go_well() {
        let config = BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        // 50 ms of every 100: 200 ms are allowed in ten seconds.
        for round in 0..4 {
            breaker.fault(lost(after(start, 100 * round), 50));
            breaker.success(after(start, 100 * round + 50));
            assert_eq!(breaker.state(), BreakerState::Closed, "round {round}");
        }
        breaker.fault(lost(after(start, 400), 50));
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn few_long_faults_and_many_short_ones_leave_it_closed() {
        let breaker = Breaker::new(BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() });
        let start = Instant::now();
        for second in 0..60 {
            // A hundredth of a second's thread, and a success beside each.
            breaker.fault(lost(after(start, 1000 * second), 10));
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
        breaker.fault(lost(now, 0));
        for rest_ms in [100, 200, 400, 400] {
            assert!(!breaker.admit(after(now, rest_ms - 1)), "{rest_ms} ms");
            now = after(now, rest_ms);
            assert!(breaker.admit(now), "{rest_ms} ms");
            breaker.fault(lost(now, 0));
        }
        now = after(now, 400);
        assert!(breaker.admit(now));
        breaker.success(now);
        now = after(now, 400);
        breaker.fault(lost(now, 0));
        assert!(breaker.admit(after(now, 100)), "it was closed for as long as it had been open");
    }
}
