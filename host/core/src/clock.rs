//! The wall clock, the time that passes, and the processor time and priority of threads. Code whose
//! results must repeat reads none of them. A simulated host has clocks of its own.

use std::sync::{Condvar, LazyLock, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::simulated;

/// Milliseconds since 1970 by the wall clock; 0 if the clock is before that.
pub fn now_ms() -> i64 {
    if let Some(host) = simulated::host() {
        return host.now_ms();
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_millis()).unwrap_or(i64::MAX)
}

/// A moment that only differences are taken of; unlike the wall clock it never goes back.
pub fn instant() -> Instant {
    static BASE: LazyLock<Instant> = LazyLock::new(Instant::now);
    match simulated::host() {
        None => Instant::now(),
        Some(host) => *BASE + host.since_start(),
    }
}

/// The time since a moment that [`instant`] gave.
pub fn since(moment: Instant) -> Duration {
    instant().saturating_duration_since(moment)
}

/// Stops this thread for a while.
pub fn sleep(duration: Duration) {
    match simulated::host() {
        None => thread::sleep(duration),
        Some(host) => host.sleep(duration),
    }
}

/// Waits while a condition holds, for at most `timeout`. On a simulated host no other thread would
/// change it, so this sleeps and lets the caller look again.
pub fn wait_while<T>(
    changed: &Condvar,
    guard: MutexGuard<'_, T>,
    timeout: Duration,
    condition: impl FnMut(&mut T) -> bool,
) {
    if let Some(host) = simulated::host() {
        drop(guard);
        return host.sleep(timeout);
    }
    let waited = changed.wait_timeout_while(guard, timeout, condition);
    drop(waited.unwrap_or_else(PoisonError::into_inner));
}

/// The unit that a number looks like if it was meant to be milliseconds since 1970; `None` if it
/// may be milliseconds, and for all other numbers.
pub fn mistaken_unit(time_ms: i64) -> Option<&'static str> {
    likely_unit(time_ms).filter(|unit| *unit != "milliseconds")
}

/// The unit that a time since 1970 looks like: times between 2001 and 2286 have 10 digits in
/// seconds, 13 in milliseconds, 16 in microseconds and 19 in nanoseconds. `None` for all other
/// numbers.
pub fn likely_unit(time: i64) -> Option<&'static str> {
    match time.checked_ilog10()? {
        9 => Some("seconds"),
        12 => Some("milliseconds"),
        15 => Some("microseconds"),
        18 => Some("nanoseconds"),
        _ => None,
    }
}

/// A time in milliseconds since 1970, to the minute, by a clock that is some hours ahead of UTC:
/// `2022-04-29 08:30`.
pub fn format_time(time_ms: i64, ahead_h: i32) -> String {
    let minutes = time_ms.saturating_add(i64::from(ahead_h) * 3_600_000).div_euclid(60_000);
    let (year, month, day) = civil(minutes.div_euclid(1440));
    let minute = minutes.rem_euclid(1440);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}", minute / 60, minute % 60)
}

/// Year, month and day of a day since the epoch, in the proleptic Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (year + era * 400 + carry, month, day)
}

/// The processor time that the calling thread has used. The difference of two readings on one
/// thread is what the work between them cost, whatever else ran meanwhile. Systems other than Linux
/// give the wall clock instead.
pub fn thread_time() -> Duration {
    #[cfg(target_os = "linux")]
    {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the call writes only to `now`, which outlives it.
        let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut now) } != 0;
        if !failed {
            return Duration::new(now.tv_sec as u64, now.tv_nsec as u32);
        }
    }
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Lowers the calling thread's priority for good: when processors are short, it gets about a tenth
/// of the time of a normal thread. Less than that would make others wait too long for its locks.
pub fn lower_priority() {
    #[cfg(target_os = "linux")]
    // SAFETY: the call takes only numbers. On Linux `PRIO_PROCESS` with 0 means the calling thread;
    // elsewhere it would be the whole process. A failure only leaves the priority as it was.
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
