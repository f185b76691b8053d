//! A circuit breaker: after repeated faults a plugin is left alone for a while,
//! so that one that runs into its deadline each time does not cost every
//! request that deadline. It does not decide what is served instead.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct BreakerConfig {
    /// Consecutive faults that open it.
    pub faults: u32,
    /// How long it stays open before one call may try again, in milliseconds.
    pub open_ms: u64,
}

impl Default for BreakerConfig {
    fn default() -> Self {
        BreakerConfig { faults: 5, open_ms: 5_000 }
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

/// Counts consecutive faults of one plugin.
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
                inner.open_until = Some(now + Duration::from_millis(self.config.open_ms));
                inner.probing = true;
                true
            }
        }
    }

    /// A call went well: the breaker closes.
    pub fn success(&self) {
        *self.lock() = Inner::default();
    }

    /// A call failed at `now`.
    pub fn fault(&self, now: Instant) {
        let mut inner = self.lock();
        inner.consecutive = inner.consecutive.saturating_add(1);
        if inner.probing || inner.consecutive >= self.config.faults {
            inner.open_until = Some(now + Duration::from_millis(self.config.open_ms));
            inner.probing = false;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_after_repeated_faults_and_lets_one_call_try() {
        let breaker = Breaker::new(BreakerConfig { faults: 2, open_ms: 100 });
        let start = Instant::now();
        breaker.fault(start);
        assert!(breaker.admit(start));
        breaker.fault(start);
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!breaker.admit(start + Duration::from_millis(99)));
        let later = start + Duration::from_millis(100);
        assert!(breaker.admit(later), "one call tries");
        assert!(!breaker.admit(later), "and only one");
        breaker.fault(later);
        assert!(!breaker.admit(later + Duration::from_millis(99)), "a failed try opens it again");
        assert!(breaker.admit(later + Duration::from_millis(100)));
        breaker.success();
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.fault(later);
        assert!(breaker.admit(later), "a success resets the count");
    }
}
