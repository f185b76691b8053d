//! Admission: refuses at once a request that cannot be answered in time, before its body is read
//! and before queues grow.
//!
//! The expected time comes from the number of requests at work and from the rate at which they left
//! while the daemon was busy (Little's law). A request whose body is still arriving occupies a slot
//! but does not count for the rate, because its client may be slow.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{
    request::api::{Refusal, RequestResult},
    threads::lock,
};

/// The share of a deadline that the expected time may take. The rest is reserve, for requests that
/// take longer than the mean.
const SHARE: f64 = 0.7;

/// Weight of the newest gap in the mean: about the last 50 requests count.
const FOLLOW: f64 = 0.02;

/// Counts requests under way, and refuses further ones.
#[derive(Debug)]
pub struct Admission {
    most: usize,
    pace: Mutex<AdmissionLoad>,
}

#[derive(Debug, Default)]
struct AdmissionLoad {
    /// Requests that were admitted, and those of them whose bodies have arrived.
    under_way: usize,
    at_work: usize,
    /// When the last request left, if others were at work then.
    left: Option<Instant>,
    /// Mean seconds between two departures while the daemon is busy.
    gap_s: Option<f64>,
}

/// Admits one request; dropping it frees its slot.
#[derive(Debug)]
pub struct AdmissionPermit {
    admission: Arc<Admission>,
    at_work: bool,
}

impl Admission {
    /// Admits at most `most` requests at a time.
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { most, pace: Mutex::new(AdmissionLoad::default()) })
    }

    /// Admits a request that must be answered within `deadline`.
    ///
    /// # Errors
    /// [`Refusal::Overloaded`], with the time after which to try again.
    pub fn enter(self: &Arc<Self>, deadline: Duration) -> RequestResult<AdmissionPermit> {
        let mut pace = lock(&self.pace);
        let expected_s = pace.gap_s.unwrap_or(0.0) * (pace.at_work + 1) as f64;
        // An idle daemon always admits a request, because only departures can correct the rate.
        let late = pace.at_work > 0 && expected_s > deadline.as_secs_f64() * SHARE;
        if pace.under_way >= self.most || late {
            let retry_after_ms = (expected_s * 1e3).ceil().max(1.0) as u64;
            return Err(Refusal::Overloaded { retry_after_ms });
        }
        pace.under_way += 1;
        Ok(AdmissionPermit { admission: self.clone(), at_work: false })
    }

    fn leave(&self, now: Instant) {
        let mut pace = lock(&self.pace);
        pace.at_work -= 1;
        if let Some(left) = pace.left {
            let gap_s = now.duration_since(left).as_secs_f64();
            pace.gap_s = Some(pace.gap_s.map_or(gap_s, |mean| mean + FOLLOW * (gap_s - mean)));
        }
        // The gap after which an idle daemon answers says nothing about its speed.
        pace.left = (pace.at_work > 0).then_some(now);
    }
}

impl AdmissionPermit {
    /// Marks the request's body as arrived: from here on its time is the daemon's.
    pub fn begin(&mut self) {
        if !self.at_work {
            self.at_work = true;
            lock(&self.admission.pace).at_work += 1;
        }
    }
}

impl Drop for AdmissionPermit {
    fn drop(&mut self) {
        if self.at_work {
            self.admission.leave(Instant::now());
        }
        lock(&self.admission.pace).under_way -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn working(admission: &Arc<Admission>, deadline: Duration) -> AdmissionPermit {
        let mut permit = admission.enter(deadline).unwrap();
        permit.begin();
        permit
    }

    /// Does what dropping the permit at `now` would do.
    fn leave(mut permit: AdmissionPermit, now: Instant) {
        permit.admission.leave(now);
        permit.at_work = false;
    }

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
        let permits: Vec<AdmissionPermit> = (0..200).map(|_| working(&admission, minute)).collect();
        // One leaves every 10 ms.
        let start = Instant::now();
        for (at, permit) in permits.into_iter().enumerate() {
            leave(permit, start + Duration::from_millis(10 * at as u64));
        }
        let second = Duration::from_secs(1);
        let _busy: Vec<AdmissionPermit> = (0..9).map(|_| working(&admission, second)).collect();
        // Nine before it and itself: 100 ms.
        assert!(admission.enter(Duration::from_millis(160)).is_ok());
        let refused = admission.enter(Duration::from_millis(130)).unwrap_err();
        assert!(matches!(refused, Refusal::Overloaded { retry_after_ms: 90..=120 }), "{refused:?}");
    }

    #[test]
    fn a_body_that_does_not_come_is_not_the_pace_of_the_others() {
        let (admission, second) = (Admission::new(1000), Duration::from_secs(1));
        let stalled = admission.enter(second).unwrap();
        let start = Instant::now();
        for at in 0..200 {
            leave(working(&admission, second), start + Duration::from_secs(at));
        }
        let _busy = working(&admission, second);
        assert!(admission.enter(second).is_ok(), "seconds between requests are the callers' doing");
        drop(stalled);
        assert_eq!(admission.pace.lock().unwrap().under_way, 1);
    }

    #[test]
    fn a_daemon_without_work_takes_the_next_request_however_slow_the_last_were() {
        let (admission, second) = (Admission::new(1000), Duration::from_secs(1));
        let start = Instant::now();
        let slow: Vec<AdmissionPermit> = (0..9).map(|_| working(&admission, second)).collect();
        for (at, permit) in slow.into_iter().enumerate() {
            leave(permit, start + Duration::from_secs(5 * at as u64));
        }
        let first = working(&admission, second);
        assert!(admission.enter(second).is_err(), "each takes five seconds");
        drop(first);
        assert!(admission.enter(second).is_ok());
    }
}
