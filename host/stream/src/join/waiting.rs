//! Impressions that wait, by what they wait for.
//!
//! Those of one surface that lack the same actions have one window, so each such
//! queue is left in the order of time, whatever windows do meanwhile.

use std::collections::{BTreeMap, BTreeSet};

use super::{delays::Delays, unit::Place};

/// What a queue's impressions have in common: their surface, and the actions that they lack (a bit each).
type Lack = (u16, u32);

/// All queues; none is empty.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    queues: BTreeMap<Lack, BTreeSet<(i64, Place)>>,
}

impl Waiting {
    pub(super) fn insert(&mut self, lack: Lack, time_ms: i64, place: Place) {
        self.queues.entry(lack).or_default().insert((time_ms, place));
    }

    pub(super) fn remove(&mut self, lack: Lack, time_ms: i64, place: Place) {
        if let Some(queue) = self.queues.get_mut(&lack) {
            queue.remove(&(time_ms, place));
            if queue.is_empty() {
                self.queues.remove(&lack);
            }
        }
    }

    /// Takes out the impressions whose windows are over, in the order of time.
    pub(super) fn due(&mut self, now_ms: i64, delays: &Delays) -> Vec<(i64, Place)> {
        let mut due = Vec::new();
        self.queues.retain(|&(surface, actions), queue| {
            let shown_by = now_ms.saturating_sub(delays.window_ms(surface, actions));
            while queue.first().is_some_and(|&(time_ms, _)| time_ms <= shown_by) {
                due.extend(queue.pop_first());
            }
            !queue.is_empty()
        });
        due.sort_unstable();
        due
    }
}
