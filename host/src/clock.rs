//! The wall clock, as events and logs tell it, and the time that a thread has used. Nothing that must come out the same
//! twice reads either.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since the epoch; 0 where the clock stands before it.
pub fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// The processor's time that the calling thread has used so far: what a call cost, whoever else kept the processor
/// meanwhile. Two readings on one thread differ by that. Where the system does not tell, it is the wall clock.
pub fn thread_time() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes to the one timespec that it is given, which lives through it.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) } != 0;
        if !failed {
            return Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
        }
    }
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_uses_no_time() {
        let (wall, own) = (std::time::Instant::now(), thread_time());
        std::thread::sleep(Duration::from_millis(50));
        let slept = thread_time() - own;
        assert!(slept < wall.elapsed() / 2, "{slept:?}");
        let mut sum = 0u64;
        while thread_time() - own < Duration::from_millis(5) {
            sum = std::hint::black_box(sum + 1);
        }
    }
}
