//! The wall clock, as events and logs tell it, and the processor's time: what a thread has used, and that it lets others
//! go first. Nothing that must come out the same
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

/// Lets other threads that want the processor go before the calling one, from now on: where it is short of time, this one
/// gets about a tenth of what each of them does. Less would make whoever waits for a lock of this one's wait for long. A
/// thread cannot take that back.
pub fn give_way() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes numbers alone. On Linux `PRIO_PROCESS` with 0 means the calling thread; elsewhere it would be
    // the whole process. That it fails changes nothing but who goes first.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, 10);
    }
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
