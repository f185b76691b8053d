//! Which requests are taken at all: a request that cannot be answered in time
//! is refused at once, before its body is read, and before queues grow.
//!
//! What a request will take is told from how many are under way and how fast
//! they have been leaving while the daemon was busy (Little's law). It knows
//! nothing of what requests do.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use super::api::Refusal;

/// How much of a deadline may be expected to pass: the rest is for what is not foreseen.
const SHARE: f64 = 0.7;

/// How fast the mean follows: about the last 50 requests count.
const FOLLOW: f64 = 0.02;

/// Counts requests under way, and refuses.
#[derive(Debug)]
pub struct Admission {
    most: usize,
    pace: Mutex<Pace>,
}

#[derive(Debug, Default)]
struct Pace {
    under_way: usize,
    /// When the last request left, if others were under way then.
    left: Option<Instant>,
    /// Seconds between two that leave while the daemon is busy.
    gap_s: Option<f64>,
}

/// A request under way; dropping it lets the next one in.
#[derive(Debug)]
pub struct Permit {
    admission: Arc<Admission>,
}

impl Admission {
    /// At most so many requests under way.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, pace: Mutex::new(Pace::default()) })
    }

    /// Lets a request in that has until its deadline.
    ///
    /// # Errors
    /// [`Refusal::Overloaded`], with the time after which to try again.
    pub fn enter(self: &Arc<Self>, deadline: Duration) -> Result<Permit, Refusal> {
        let mut pace = self.pace.lock().expect("no holder panics");
        let expected_s = pace.gap_s.unwrap_or(0.0) * (pace.under_way + 1) as f64;
        if pace.under_way >= self.most || expected_s > deadline.as_secs_f64() * SHARE {
            let retry_after_ms = (expected_s * 1e3).ceil().max(1.0) as u64;
            return Err(Refusal::Overloaded { retry_after_ms });
        }
        pace.under_way += 1;
        Ok(Permit { admission: self.clone() })
    }

    fn leave(&self, now: Instant) {
        let mut pace = self.pace.lock().expect("no holder panics");
        pace.under_way -= 1;
        if let Some(left) = pace.left {
            let gap_s = now.duration_since(left).as_secs_f64();
            pace.gap_s = Some(pace.gap_s.map_or(gap_s, |mean| mean + FOLLOW * (gap_s - mean)));
        }
        // An idle daemon says nothing of how fast it can be.
        pace.left = (pace.under_way > 0).then_some(now);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.admission.leave(Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_under_way_is_a_bound_and_leaving_makes_room() {
        let admission = Admission::new(2);
        let minute = Duration::from_secs(60);
        let (one, _two) = (admission.enter(minute).unwrap(), admission.enter(minute).unwrap());
        assert!(matches!(admission.enter(minute), Err(Refusal::Overloaded { .. })));
        drop(one);
        assert!(admission.enter(minute).is_ok());
    }

    #[test]
    fn what_cannot_be_in_time_is_refused_and_what_can_is_not() {
        let admission = Admission::new(1000);
        let minute = Duration::from_secs(60);
        let permits: Vec<Permit> = (0..200).map(|_| admission.enter(minute).unwrap()).collect();
        // They leave one every 10 ms.
        let start = Instant::now();
        for (at, permit) in permits.into_iter().enumerate() {
            admission.leave(start + Duration::from_millis(10 * at as u64));
            std::mem::forget(permit);
        }
        let _busy: Vec<Permit> =
            (0..9).map(|_| admission.enter(Duration::from_millis(1000)).unwrap()).collect();
        // Nine before it and itself: 100 ms.
        assert!(admission.enter(Duration::from_millis(200)).is_ok());
        let refused = admission.enter(Duration::from_millis(100)).unwrap_err();
        assert!(matches!(refused, Refusal::Overloaded { retry_after_ms: 90..=120 }), "{refused:?}");
    }
}
