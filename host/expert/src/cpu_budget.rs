//! Limits on the daemon's threads that one plugin can occupy.
//!
//! A plugin with slow calls gets a limited number of threads ([`ThreadGate`]), so that the other
//! plugins always find a free one. A plugin with fast calls may use all threads. A call over the
//! limit is refused at once: a queue of slow calls would only give late answers.
//!
//! A call that runs on for longer than usual lowers its thread's priority and is reported to the
//! gate while it still runs ([`CpuBudget`]). The deadline ends a call, and the breaker decides
//! whether the plugin is called again.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypercast_core::clock::thread_time;

/// Weight of the newest call in the moving average of call times: about four calls count, so that
/// one call that runs into its deadline is enough to make a plugin slow.
const NEWEST_WEIGHT: f64 = 0.25;

/// CPU time after which a call's thread lowers its priority: dozens of times the cost of an
/// ordinary `rank`. A thread whose priority was lowered is replaced, which costs about this much.
const LOWER_PRIORITY_AFTER_MS: f64 = 2.0;

/// What a plugin with slow calls may occupy.
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// Mean CPU time of calls, in milliseconds, above which a plugin is slow. CPU time, because on
    /// a busy machine every call is slow by the wall clock.
    pub slow_ms: f64,
    /// Threads that a slow plugin may occupy at a time.
    pub threads: u32,
}

impl Default for GateConfig {
    fn default() -> Self {
        GateConfig { slow_ms: 10.0, threads: 1 }
    }
}

/// Counts the running calls of one plugin and admits new ones.
#[derive(Debug, Default)]
pub(super) struct ThreadGate {
    running: AtomicU32,
    /// Running calls that have already exceeded `slow_ms`.
    running_slow: AtomicU32,
    /// Moving average of a call's CPU time, in nanoseconds.
    mean_ns: AtomicU64,
}

/// A running call's right to a thread; returned on drop.
pub(super) struct ThreadPermit<'a> {
    gate: &'a ThreadGate,
    /// CPU time of this thread at the start.
    cpu_start: Duration,
    start: Instant,
}

impl ThreadGate {
    /// Admits a call. The error is the reason why it is refused.
    pub(super) fn enter(&self, config: &GateConfig) -> Result<ThreadPermit<'_>, String> {
        let running = self.running.fetch_add(1, Ordering::Relaxed);
        let mean_ms = self.mean_ns.load(Ordering::Relaxed) as f64 / 1e6;
        // Running calls count before they end: many may start before the first reaches its
        // deadline and raises the mean.
        let running_slow = self.running_slow.load(Ordering::Relaxed);
        if running_slow >= config.threads || (running >= config.threads && mean_ms > config.slow_ms)
        {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(format!(
                "it is slow (mean call {mean_ms:.0} ms, {running_slow} running calls over the \
                 limit), and its {running} running calls use all threads that it may have"
            ));
        }
        Ok(ThreadPermit { gate: self, cpu_start: thread_time(), start: Instant::now() })
    }

    fn leave(&self, cpu_time: Duration) {
        self.running.fetch_sub(1, Ordering::Relaxed);
        let mean = self.mean_ns.load(Ordering::Relaxed) as f64;
        let mean = mean + NEWEST_WEIGHT * (cpu_time.as_nanos() as f64 - mean);
        // Of two calls that end at once, one may be lost from the mean. It is a rule of thumb.
        self.mean_ns.store(mean as u64, Ordering::Relaxed);
    }
}

impl ThreadPermit<'_> {
    /// What the call has cost so far: its CPU time if it is short. A slow call ran at low priority
    /// while its caller waited, so its wall-clock time counts.
    pub(super) fn cost(&self, config: &GateConfig) -> Duration {
        let cpu_time = self.cpu_time();
        let is_slow = cpu_time.as_secs_f64() * 1e3 >= config.slow_ms;
        if is_slow { self.start.elapsed() } else { cpu_time }
    }

    fn cpu_time(&self) -> Duration {
        thread_time().saturating_sub(self.cpu_start)
    }
}

impl Drop for ThreadPermit<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.cpu_time());
    }
}

thread_local! {
    static ON_LONG_CALL: Cell<Option<fn()>> = const { Cell::new(None) };
}

/// Sets what the calling thread does, once a call, when a guest's call on it takes long: a pool's
/// thread lowers its priority. A thread without a hook does nothing.
pub fn on_long_call(hook: fn()) {
    ON_LONG_CALL.set(Some(hook));
}

/// When a call is slow, and which gate counts it.
pub(super) struct LongCallRule {
    /// None for calls that no gate admits.
    pub(super) gate: Option<Arc<ThreadGate>>,
    pub(super) slow_ms: f64,
}

/// The remaining time of a running call, in ticks of the engine's epoch. Dropped at its end.
pub(super) struct CpuBudget {
    ticks_left: u64,
    cpu_start: Duration,
    rule: LongCallRule,
    hook_ran: bool,
    is_slow: bool,
}

impl CpuBudget {
    /// Starts a call on this thread that may take `ticks`. Also returns the ticks until the first
    /// [`CpuBudget::next_check`].
    pub(super) fn begin(ticks: u64, rule: LongCallRule) -> (CpuBudget, u64) {
        // CPU time never exceeds wall-clock time, so an earlier check would find nothing.
        let first = ticks.min(LOWER_PRIORITY_AFTER_MS.min(rule.slow_ms).ceil() as u64).max(1);
        let ticks_left = ticks.saturating_sub(first);
        let cpu_start = thread_time();
        (CpuBudget { ticks_left, cpu_start, rule, hook_ran: false, is_slow: false }, first)
    }

    /// Checks the call's CPU time and returns the ticks until the next check. None at the
    /// deadline.
    pub(super) fn next_check(&mut self) -> Option<u64> {
        // CPU time: a call that waited for a busy machine is not slow.
        let cpu_ms = thread_time().saturating_sub(self.cpu_start).as_secs_f64() * 1e3;
        if !self.hook_ran && cpu_ms >= LOWER_PRIORITY_AFTER_MS {
            self.hook_ran = true;
            if let Some(hook) = ON_LONG_CALL.get() {
                hook();
            }
        }
        if !self.is_slow && cpu_ms >= self.rule.slow_ms {
            self.is_slow = true;
            if let Some(gate) = &self.rule.gate {
                gate.running_slow.fetch_add(1, Ordering::Relaxed);
            }
        }
        let nothing_left_to_find = self.hook_ran && self.is_slow;
        let step = if nothing_left_to_find { self.ticks_left } else { self.ticks_left.min(1) };
        self.ticks_left -= step;
        (step > 0).then_some(step)
    }
}

impl Drop for CpuBudget {
    fn drop(&mut self) {
        if let (true, Some(gate)) = (self.is_slow, &self.rule.gate) {
            gate.running_slow.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    thread_local! {
        static HOOK_RUNS: Cell<u32> = const { Cell::new(0) };
    }

    #[test]
    fn only_a_slow_plugin_is_limited_to_its_threads() {
        let (gate, config) = (ThreadGate::default(), GateConfig::default());
        let permits: Vec<ThreadPermit> = (0..8).map(|_| gate.enter(&config).unwrap()).collect();
        drop(permits);
        // One call that ran into a deadline of 50 ms.
        let _ = gate.running.fetch_add(1, Ordering::Relaxed);
        gate.leave(Duration::from_millis(50));
        let held = gate.enter(&config).unwrap();
        let refused = gate.enter(&config).err().unwrap();
        assert!(refused.contains("it is slow (mean call 1"), "{refused}");
        std::mem::forget(held);
        gate.leave(Duration::ZERO);
        let free = gate.enter(&config).unwrap();
        std::mem::forget(free);
        // Short calls again: the mean falls below the bound.
        for _ in 0..20 {
            gate.leave(Duration::ZERO);
            gate.running.fetch_add(1, Ordering::Relaxed);
        }
        assert!(gate.enter(&config).is_ok());
        // A running call that becomes slow blocks others until it ends.
        gate.running_slow.fetch_add(1, Ordering::Relaxed);
        assert!(gate.enter(&config).is_err());
        gate.running_slow.fetch_sub(1, Ordering::Relaxed);
        assert!(gate.enter(&config).is_ok());
    }

    fn busy(time_ms: u64) {
        let start = thread_time();
        while thread_time() - start < Duration::from_millis(time_ms) {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_long_call_runs_the_hook_once_gets_all_its_ticks_and_blocks_others() {
        on_long_call(|| HOOK_RUNS.set(HOOK_RUNS.get() + 1));
        let gate = Arc::new(ThreadGate::default());
        let rule = || LongCallRule { gate: Some(gate.clone()), slow_ms: 5.0 };
        let (mut budget, first) = CpuBudget::begin(51, rule());
        assert_eq!((first, HOOK_RUNS.get()), (2, 0));
        assert_eq!((budget.next_check(), HOOK_RUNS.get()), (Some(1), 0), "little CPU time so far");
        busy(2);
        assert_eq!((budget.next_check(), HOOK_RUNS.get()), (Some(1), 1));
        assert!(gate.enter(&GateConfig::default()).is_ok(), "it may end soon");
        busy(3);
        assert_eq!((budget.next_check(), HOOK_RUNS.get()), (Some(47), 1));
        assert_eq!((budget.next_check(), HOOK_RUNS.get()), (None, 1));
        assert!(gate.enter(&GateConfig::default()).is_err());
        drop(budget);
        assert!(gate.enter(&GateConfig::default()).is_ok());
        let (mut budget, first) = CpuBudget::begin(2, rule());
        assert_eq!((budget.next_check(), first), (None, 2));
    }
}
