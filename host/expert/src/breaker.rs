//! A circuit breaker: after repeated faults a plugin is not called for a while. Otherwise a plugin
//! that always runs into its deadline would delay every request by that deadline.
//!
//! It opens after some faults in a row, or if faults take more than a share of one thread's time,
//! in a row or not. Each time that it opens soon after it closed, it stays open for longer.
//!
//! Faults of one user alone say that something about that user is odd, not that the plugin is
//! broken. They set the user aside for a while: the user's requests are refused, and the breaker
//! stays closed for all others.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::lock;

/// The most users whose faults are remembered one by one.
const USERS: usize = 1024;

/// The period over which [`BreakerConfig::lost_share`] is measured.
const LOST_WINDOW: Duration = Duration::from_secs(10);

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, PartialEq)]
pub struct BreakerConfig {
    /// Consecutive faults, of different users, that open it; of one user, that set the user aside.
    pub faults: u32,
    /// The breaker opens when calls that end in faults take this share of one thread's time over
    /// ten seconds.
    pub lost_share: f64,
    /// How long it stays open before one call may try again, and how long a user is set aside, in
    /// milliseconds.
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

/// A failed call, as a breaker counts it.
#[derive(Debug, Clone, Copy)]
pub struct FailedCall {
    /// The user of the request.
    pub user: u64,
    /// The end of the call.
    pub at: Instant,
    /// What it cost: CPU time for a short call, because a busy machine is not the plugin's fault.
    pub cost: Duration,
}

/// Counts the faults of one plugin and their cost.
#[derive(Debug)]
pub struct Breaker {
    config: BreakerConfig,
    counts: Mutex<FaultCounts>,
    /// That of the counts, so that who reads it holds up no request.
    state: AtomicU8,
}

#[derive(Debug, Default)]
struct FaultCounts {
    /// The users whose calls failed since a call last went well, each once.
    failed_users: Vec<u64>,
    /// Users whose last calls failed.
    users: HashMap<u64, UserFaults>,
    open_until: Option<Instant>,
    is_testing: bool,
    /// How long the breaker is or was open, in milliseconds; 0 before it opened at all.
    open_ms: u64,
    closed_at: Option<Instant>,
    lost_time: Option<LeakyBucket>,
}

/// A user whose last calls failed.
#[derive(Debug, Clone, Copy, Default)]
struct UserFaults {
    consecutive: u32,
    set_aside_until: Option<Instant>,
}

/// The cost of failed calls, less what was allowed since.
#[derive(Debug, Clone, Copy)]
struct LeakyBucket {
    at: Instant,
    level_s: f64,
    /// The user of all these calls; `None` if there were several.
    only_user: Option<u64>,
}

impl Breaker {
    /// A breaker that is closed and has counted no fault.
    pub fn new(config: BreakerConfig) -> Breaker {
        let (counts, state) = (Mutex::default(), AtomicU8::new(BreakerState::Closed as u8));
        Breaker { config, counts, state }
    }

    /// Whether the requests of `user` are refused at `now`, because the last ones failed.
    pub fn is_set_aside(&self, user: u64, now: Instant) -> bool {
        let user = lock(&self.counts).users.get(&user).copied().unwrap_or_default();
        user.set_aside_until.is_some_and(|until| now < until)
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
                self.publish(&counts);
                true
            }
        }
    }

    /// A call for `user` succeeded at `now`: the breaker closes.
    pub fn success(&self, user: u64, now: Instant) {
        let mut counts = lock(&self.counts);
        counts.failed_users.clear();
        counts.users.remove(&user);
        if counts.open_until.take().is_some() {
            (counts.is_testing, counts.closed_at) = (false, Some(now));
            self.publish(&counts);
        }
    }

    /// A call failed: the breaker may open, or set the user aside.
    pub fn fault(&self, call: FailedCall) {
        let mut counts = lock(&self.counts);
        let lost = counts.add_lost_time(call, self.config.lost_share);
        let lost_too_much = lost.level_s >= self.config.lost_share * LOST_WINDOW.as_secs_f64();
        counts.add_user_fault(call, &self.config, lost_too_much);
        if lost_too_much && lost.only_user.is_some() {
            // The user who lost it is set aside, which makes up for it.
            counts.lost_time = None;
        }
        // Of one user alone no number of faults opens it.
        let needed = self.config.faults.max(2) as usize;
        if !counts.failed_users.contains(&call.user) && counts.failed_users.len() < needed {
            counts.failed_users.push(call.user);
        }
        let by_several = lost_too_much && lost.only_user.is_none();
        if counts.is_testing || counts.failed_users.len() >= needed || by_several {
            counts.open(call.at, &self.config);
            self.publish(&counts);
        }
    }

    /// Whether it lets calls pass at present.
    pub fn state(&self) -> BreakerState {
        let states = [BreakerState::Closed, BreakerState::Open, BreakerState::HalfOpen];
        states[usize::from(self.state.load(Relaxed))]
    }

    fn publish(&self, counts: &FaultCounts) {
        let state = match (counts.open_until, counts.is_testing) {
            (None, _) => BreakerState::Closed,
            (Some(_), true) => BreakerState::HalfOpen,
            (Some(_), false) => BreakerState::Open,
        };
        self.state.store(state as u8, Relaxed);
    }
}

impl FaultCounts {
    /// Adds a failed call and returns the present lost time.
    fn add_lost_time(&mut self, call: FailedCall, allowed_share: f64) -> LeakyBucket {
        let empty = LeakyBucket { at: call.at, level_s: 0.0, only_user: Some(call.user) };
        let mut bucket = self.lost_time.unwrap_or(empty);
        let elapsed = call.at.saturating_duration_since(bucket.at);
        bucket.level_s -= elapsed.as_secs_f64() * allowed_share;
        if bucket.level_s <= 0.0 {
            bucket = empty;
        }
        bucket.at = call.at;
        bucket.level_s += call.cost.as_secs_f64();
        bucket.only_user = bucket.only_user.filter(|user| *user == call.user);
        *self.lost_time.insert(bucket)
    }

    /// Counts a failed call for its user, who is set aside after some in a row, or at once if the
    /// user's calls alone took too much time.
    fn add_user_fault(&mut self, call: FailedCall, config: &BreakerConfig, lost_too_much: bool) {
        if self.users.len() >= USERS {
            self.users.retain(|_, user| user.set_aside_until.is_some_and(|until| call.at < until));
        }
        if self.users.len() >= USERS && !self.users.contains_key(&call.user) {
            return;
        }
        let user = self.users.entry(call.user).or_default();
        user.consecutive = user.consecutive.saturating_add(1);
        if user.consecutive >= config.faults || lost_too_much {
            let until = call.at + Duration::from_millis(config.open_ms);
            *user = UserFaults { consecutive: 0, set_aside_until: Some(until) };
        }
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
        self.is_testing = false;
        self.failed_users.clear();
        // The open time makes up for the lost time.
        self.lost_time = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    fn after(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    /// A failed call of a user of its own.
    fn failed(at: Instant, cost_ms: u64) -> FailedCall {
        static USER: AtomicU64 = AtomicU64::new(1);
        let user = USER.fetch_add(1, Ordering::Relaxed);
        FailedCall { user, at, cost: Duration::from_millis(cost_ms) }
    }

    #[test]
    fn one_user_is_set_aside_alone() {
        let config = BreakerConfig { faults: 3, open_ms: 100, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        let of = |user, cost_ms| FailedCall { user, ..failed(start, cost_ms) };
        for _ in 0..2 {
            breaker.fault(of(7, 0));
        }
        assert!(!breaker.is_set_aside(7, start), "two faults are few");
        breaker.fault(of(7, 0));
        assert!(breaker.is_set_aside(7, start));
        assert!(breaker.is_set_aside(7, after(start, 99)) && !breaker.is_set_aside(8, start));
        assert!(!breaker.is_set_aside(7, after(start, 100)), "then it may try again");
        for _ in 0..30 {
            breaker.fault(of(7, 0));
        }
        breaker.fault(of(9, 5_000));
        assert!(breaker.is_set_aside(9, start), "one fault that takes long is enough");
        assert_eq!(
            breaker.state(),
            BreakerState::Closed,
            "faults of two users are no run of three"
        );
        breaker.fault(of(10, 0));
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn users_are_remembered_up_to_a_bound_and_forgotten_after_a_good_call() {
        let config = BreakerConfig { faults: 2, open_ms: 100, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        for user in 0..2 * USERS as u64 {
            breaker.fault(FailedCall { user, ..failed(start, 0) });
        }
        assert!(lock(&breaker.counts).users.len() <= USERS);
        breaker.fault(FailedCall { user: 5, ..failed(start, 0) });
        breaker.success(5, start);
        breaker.fault(FailedCall { user: 5, ..failed(start, 0) });
        assert!(!breaker.is_set_aside(5, start), "a success resets the count");
    }

    #[test]
    fn opens_after_repeated_faults_and_lets_one_call_try() {
        let config = BreakerConfig { faults: 2, open_ms: 100, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        breaker.fault(failed(start, 0));
        assert!(breaker.admit(start));
        breaker.fault(failed(start, 0));
        assert_eq!(breaker.state(), BreakerState::Open);
        assert!(!breaker.admit(after(start, 99)));
        let later = after(start, 100);
        assert!(breaker.admit(later), "one call tries");
        assert!(!breaker.admit(later), "and only one");
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
        breaker.fault(failed(later, 0));
        assert!(!breaker.admit(after(later, 199)), "a failed try opens it for twice as long");
        assert!(breaker.admit(after(later, 200)));
        breaker.success(0, after(later, 200));
        assert_eq!(breaker.state(), BreakerState::Closed);
        breaker.fault(failed(after(later, 201), 0));
        assert!(breaker.admit(after(later, 201)), "a success resets the count");
    }

    #[test]
    fn faults_that_take_long_open_it_though_calls_between_go_well() {
        let config = BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() };
        let breaker = Breaker::new(config);
        let start = Instant::now();
        // 50 ms of every 100: 200 ms are allowed in ten seconds.
        for round in 0..4 {
            breaker.fault(failed(after(start, 100 * round), 50));
            breaker.success(0, after(start, 100 * round + 50));
            assert_eq!(breaker.state(), BreakerState::Closed, "round {round}");
        }
        breaker.fault(failed(after(start, 400), 50));
        assert_eq!(breaker.state(), BreakerState::Open);
    }

    #[test]
    fn few_long_faults_and_many_short_ones_leave_it_closed() {
        let breaker = Breaker::new(BreakerConfig { lost_share: 0.02, ..BreakerConfig::default() });
        let start = Instant::now();
        for second in 0..60 {
            // A hundredth of a second's thread, and a success beside each.
            breaker.fault(failed(after(start, 1000 * second), 10));
            breaker.success(0, after(start, 1000 * second + 10));
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }

    #[test]
    fn rests_grow_to_a_bound_and_a_long_good_time_makes_them_short_again() {
        let config =
            BreakerConfig { faults: 1, open_ms: 100, open_max_ms: 400, ..Default::default() };
        let breaker = Breaker::new(config);
        let mut now = Instant::now();
        breaker.fault(failed(now, 0));
        breaker.fault(failed(now, 0));
        for rest_ms in [100, 200, 400, 400] {
            assert!(!breaker.admit(after(now, rest_ms - 1)), "{rest_ms} ms");
            now = after(now, rest_ms);
            assert!(breaker.admit(now), "{rest_ms} ms");
            breaker.fault(failed(now, 0));
        }
        now = after(now, 400);
        assert!(breaker.admit(now));
        breaker.success(0, now);
        now = after(now, 400);
        breaker.fault(failed(now, 0));
        breaker.fault(failed(now, 0));
        assert!(breaker.admit(after(now, 100)), "it was closed for as long as it had been open");
    }
}
