//! What a version did since its step began, and over the last while: snapshots of its counts, bounded in number.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::tally::{Counts, Tally};

/// Snapshots a window.
const SNAPSHOTS: u32 = 30;

/// One step of one rollout, as this process saw it.
pub(super) struct Watch {
    /// When it began to look.
    pub(super) began: Instant,
    /// The version.
    pub(super) own: Windowed,
    /// The version before.
    pub(super) before: Windowed,
    /// When its quality was last judged.
    pub(super) judged: Option<Instant>,
    /// Why it is held, as last told.
    pub(super) held: Option<String>,
}

impl Watch {
    /// Begins, with a window of so many seconds.
    pub(super) fn new(now: Instant, window_s: u64) -> Self {
        let window = Duration::from_secs(window_s);
        let windowed = || Windowed { window, first: None, snapshots: VecDeque::new() };
        Self { began: now, own: windowed(), before: windowed(), judged: None, held: None }
    }
}

/// A version's counts over a window.
pub(super) struct Windowed {
    window: Duration,
    first: Option<Counts>,
    snapshots: VecDeque<(Instant, Counts)>,
}

/// What was counted.
pub(super) struct Looked {
    /// Since the first look.
    pub(super) whole: Counts,
    /// Over the window, or since the first look.
    pub(super) window: Counts,
}

impl Windowed {
    /// Looks at counts now.
    pub(super) fn look(&mut self, now: Instant, tally: &Tally) -> Looked {
        let counts = tally.counts();
        let first = self.first.get_or_insert_with(|| counts.clone());
        while self.snapshots.front().is_some_and(|(at, _)| now - *at > self.window) {
            self.snapshots.pop_front();
        }
        let due = self.window / SNAPSHOTS;
        if self.snapshots.back().is_none_or(|(at, _)| now - *at >= due) {
            self.snapshots.push_back((now, counts.clone()));
        }
        let oldest = self.snapshots.front().map_or(&counts, |(_, counts)| counts);
        Looked { whole: counts.since(first), window: counts.since(oldest) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_forgets_and_the_whole_does_not() {
        let (tally, start) = (Tally::default(), Instant::now());
        let mut watched = Watch::new(start, 60).own;
        watched.look(start, &tally);
        for second in 1..=600 {
            tally.add(Duration::from_millis(1), second <= 10);
            watched.look(start + Duration::from_secs(second), &tally);
        }
        let looked = watched.look(start + Duration::from_secs(600), &tally);
        assert_eq!((looked.whole.requests, looked.whole.faults), (600, 10));
        assert_eq!(looked.window.faults, 0);
        assert!((55..=65).contains(&looked.window.requests), "{}", looked.window.requests);
        assert!(watched.snapshots.len() <= SNAPSHOTS as usize + 1);
    }
}
