//! Fair threads: a plugin whose calls take long may hold a part of the daemon's
//! threads only, so that the others find one free.
//!
//! A plugin whose calls are short may hold all of them: nobody waits long behind it. What is over is answered
//! at once, not queued: a queue of slow calls would only make its callers wait for a late answer.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How fast the mean follows: about the last four calls count, so that one call to a deadline is enough.
const FOLLOW: f64 = 0.25;

/// What a plugin whose calls take long may hold.
#[derive(Debug, Clone, PartialEq)]
pub struct GateConfig {
    /// The mean time of calls above which they take long, in milliseconds.
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
    /// Nanoseconds of a call, on average.
    mean_ns: AtomicU64,
}

/// A call under way; dropping it ends it.
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    start: Instant,
}

impl Gate {
    /// Lets a call in, or says why not.
    pub(super) fn enter(&self, config: &GateConfig, now: Instant) -> Result<Pass<'_>, String> {
        let running = self.running.fetch_add(1, Ordering::Relaxed);
        let mean_ms = self.mean_ns.load(Ordering::Relaxed) as f64 / 1e6;
        if running >= config.threads && mean_ms > config.slow_ms {
            self.running.fetch_sub(1, Ordering::Relaxed);
            return Err(format!(
                "its calls take {mean_ms:.0} ms lately, and {running} of them hold as many threads as they may"
            ));
        }
        Ok(Pass { gate: self, start: now })
    }

    fn leave(&self, took: Duration) {
        self.running.fetch_sub(1, Ordering::Relaxed);
        let mean = self.mean_ns.load(Ordering::Relaxed) as f64;
        let mean = mean + FOLLOW * (took.as_nanos() as f64 - mean);
        // Two that end at once may overwrite each other: the mean is a rule of thumb.
        self.mean_ns.store(mean as u64, Ordering::Relaxed);
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.leave(self.start.elapsed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_plugin_whose_calls_take_long_is_held_to_its_threads() {
        let (gate, config, now) = (Gate::default(), GateConfig::default(), Instant::now());
        let passes: Vec<Pass> = (0..8).map(|_| gate.enter(&config, now).unwrap()).collect();
        drop(passes);
        // One call to a deadline of 50 ms, as its start tells.
        let _ = gate.running.fetch_add(1, Ordering::Relaxed);
        gate.leave(Duration::from_millis(50));
        let held = gate.enter(&config, now).unwrap();
        let refused = gate.enter(&config, now).err().unwrap();
        assert!(refused.contains("ms lately"), "{refused}");
        std::mem::forget(held);
        gate.leave(Duration::ZERO);
        let free = gate.enter(&config, now).unwrap();
        std::mem::forget(free);
        // Short calls again: the mean falls below the bound.
        for _ in 0..20 {
            gate.leave(Duration::ZERO);
            gate.running.fetch_add(1, Ordering::Relaxed);
        }
        assert!(gate.enter(&config, now).is_ok());
    }
}
