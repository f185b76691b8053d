//! Fair threads: a plugin whose calls take long may hold a part of the daemon's
//! threads only, so that the others find one free.
//!
//! A plugin whose calls are short may hold all of them: nobody waits long behind it. What is over is answered
//! at once, not queued: a queue of slow calls would only make its callers wait for a late answer.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hypercast_core::clock::thread_time;

/// How fast the mean follows: about the last four calls count, so that one call to a deadline is enough.
const FOLLOW: f64 = 0.25;

/// What a plugin whose calls take long may hold.
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// The mean time of calls above which they take long, in milliseconds of the processor: on a machine that is busy with
    /// others every call takes long by the wall clock.
    pub slow_ms: f64,
    /// Threads that such calls may hold at one time.
    pub threads: u32,
}

impl Default for GateConfig {
    fn default() -> Self {
        GateConfig { slow_ms: 10.0, threads: 1 }
    }
}

/// Counts one plugin's calls under way.
#[derive(Debug, Default)]
pub(super) struct Gate {
    running: AtomicU32,
    /// Of them, those that have taken long already.
    long: AtomicU32,
    /// Nanoseconds of a call, on average.
    mean_ns: AtomicU64,
}

/// A call under way; dropping it ends it.
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    /// Of this thread's own time.
    start: Duration,
    since: Instant,
}

impl Gate {
    /// Lets a call in, or says why not.
    pub(super) fn enter(&self, config: &GateConfig) -> Result<Pass<'_>, String> {
        let running = self.running.fetch_add(1, Ordering::Relaxed);
        let mean_ms = self.mean_ns.load(Ordering::Relaxed) as f64 / 1e6;
        // What has not ended yet counts too: until the first call to a deadline ends, many may have begun.
        let long = self.long.load(Ordering::Relaxed);
        if long >= config.threads || (running >= config.threads && mean_ms > config.slow_ms) {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(format!(
                "its calls take {mean_ms:.0} ms lately, {long} that run now long already, and the {running} of them hold as many threads as they may"
            ));
        }
        Ok(Pass { gate: self, start: thread_time(), since: Instant::now() })
    }

    /// A call under way is found to take long.
    pub(super) fn grew_long(&self) {
        self.long.fetch_add(1, Ordering::Relaxed);
    }

    /// Such a call ended.
    pub(super) fn long_ended(&self) {
        self.long.fetch_sub(1, Ordering::Relaxed);
    }

    fn leave(&self, took: Duration) {
        self.running.fetch_sub(1, Ordering::Relaxed);
        let mean = self.mean_ns.load(Ordering::Relaxed) as f64;
        let mean = mean + FOLLOW * (took.as_nanos() as f64 - mean);
        // Two that end at once may overwrite each other: the mean is a rule of thumb.
        self.mean_ns.store(mean as u64, Ordering::Relaxed);
    }
}

impl Pass<'_> {
    /// What the call has cost so far: the processor's time, as long as it is short. A long one gave way to the others, and
    /// its caller waited all the same: it counts from its beginning.
    pub(super) fn lost(&self, config: &GateConfig) -> Duration {
        let took = self.took();
        match took.as_secs_f64() * 1e3 >= config.slow_ms {
            true => self.since.elapsed(),
            false => took,
        }
    }

    /// The processor's time that the call has taken so far, on the thread that it came in on.
    fn took(&self) -> Duration {
        thread_time().saturating_sub(self.start)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.took());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plugin_whose_calls_take_long_is_held_to_its_threads() {
        let (gate, config) = (Gate::default(), GateConfig::default());
        let passes: Vec<Pass> = (0..8).map(|_| gate.enter(&config).unwrap()).collect();
        drop(passes);
        // One call to a deadline of 50 ms, as its start tells.
        let _ = gate.running.fetch_add(1, Ordering::Relaxed);
        gate.leave(Duration::from_millis(50));
        let held = gate.enter(&config).unwrap();
        let refused = gate.enter(&config).err().unwrap();
        assert!(refused.contains("ms lately"), "{refused}");
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
        // One that grows long lets no other in before it ends.
        gate.grew_long();
        assert!(gate.enter(&config).is_err());
        gate.long_ended();
        assert!(gate.enter(&config).is_ok());
    }
}
