//! How many records a process sets aside, and whether these are more than now and then.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use hypercast_core::clock;

/// Records in a minute that are no reason to worry.
const FEW: usize = 5;

/// The time over which they are counted.
const PERIOD: Duration = Duration::from_secs(60);

/// Counts the records that a process sets aside.
#[derive(Debug, Default)]
pub struct SetAsideRate(Mutex<SetAsideCounts>);

#[derive(Debug, Default)]
struct SetAsideCounts {
    total: u64,
    /// When the newest records were set aside, one more than are few.
    newest: VecDeque<Instant>,
}

impl SetAsideRate {
    /// Counts records that were set aside just now.
    pub fn add(&self, records: usize) {
        self.add_at(clock::instant(), records);
    }

    /// All records since the process began.
    pub fn total(&self) -> u64 {
        self.counts().total
    }

    /// What is wrong, as long as more than a few records a minute are set aside.
    pub fn warning(&self) -> Option<String> {
        self.warning_at(clock::instant())
    }

    fn counts(&self) -> std::sync::MutexGuard<'_, SetAsideCounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add_at(&self, now: Instant, records: usize) {
        let mut counts = self.counts();
        counts.total += records as u64;
        counts.newest.extend(std::iter::repeat_n(now, records.min(FEW + 1)));
        let surplus = counts.newest.len().saturating_sub(FEW + 1);
        counts.newest.drain(..surplus);
    }

    fn warning_at(&self, now: Instant) -> Option<String> {
        let counts = self.counts();
        let oldest = counts.newest.front().filter(|_| counts.newest.len() > FEW)?;
        (now.saturating_duration_since(*oldest) < PERIOD).then(|| {
            format!(
                "more than {FEW} records were set aside within a minute, {} since the start; \
                 `hypercast dead-letters list` says which and why",
                counts.total
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_than_a_few_a_minute_warn_until_a_minute_is_over() {
        let rate = SetAsideRate::default();
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        for at in 0..30 {
            rate.add_at(after(at * 13), 1);
            assert_eq!(rate.warning_at(after(at * 13)), None, "record {at}: five a minute");
        }
        rate.add_at(after(400), 1000);
        let warning = rate.warning_at(after(459)).unwrap();
        assert!(warning.contains("1030 since the start"), "{warning}");
        assert_eq!(rate.warning_at(after(460)), None, "it clears by itself");
        assert_eq!(rate.counts().newest.len(), FEW + 1, "bounded");
    }
}
