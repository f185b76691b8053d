//! Wakes the readers of a stream in the writer's own process.
//!
//! Without it a reader sees an append only at its next poll. In a daemon two readers follow each
//! other (the joiner and the serving features), so an event would wait some 10 ms for them.

use std::sync::{Condvar, Mutex};
use std::time::Duration;

use hypercast_core::clock;

use crate::streams::locked;

/// Counts the appends of this process to one stream.
#[derive(Debug, Default)]
pub(super) struct AppendSignal {
    count: Mutex<u64>,
    appended: Condvar,
}

impl AppendSignal {
    pub(super) fn count(&self) -> u64 {
        *locked(&self.count)
    }

    pub(super) fn notify(&self) {
        *locked(&self.count) += 1;
        self.appended.notify_all();
    }

    /// Waits for an append after the `seen` ones, for at most `timeout`.
    pub(super) fn wait(&self, seen: u64, timeout: Duration) {
        clock::wait_while(&self.appended, locked(&self.count), timeout, |count| *count == seen);
    }
}
