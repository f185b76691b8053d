//! Buffers that outlive a request, so that the next one finds its memory there.

use std::sync::Mutex;

/// Buffers that are kept: as many as there may be requests at a time, on most machines.
const KEPT: usize = 32;

/// Buffers that nobody uses at the moment.
#[derive(Debug, Default)]
pub(super) struct Pool<T>(Mutex<Vec<T>>);

impl<T: Default> Pool<T> {
    /// Lends a buffer, with what the last user left in it.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut T) -> R) -> R {
        let kept = || self.0.lock().expect("no holder panics");
        let mut buffer = kept().pop().unwrap_or_default();
        let result = work(&mut buffer);
        let mut kept = kept();
        if kept.len() < KEPT {
            kept.push(buffer);
        }
        result
    }
}
