//! What a thread makes ahead of whoever takes it, a bounded number of items.

use std::panic::resume_unwind;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::error::{CommonErrors as _, Error, Result};

/// Items from a thread. Dropping it ends the thread at its next item.
pub(crate) struct Prefetch<T> {
    items: Receiver<T>,
    /// Gone once it was seen to end.
    thread: Option<JoinHandle<Result<()>>>,
}

/// Where a thread puts its items. It waits while as many as are allowed were not taken yet.
pub(crate) struct ItemSender<T>(SyncSender<T>);

impl<T> ItemSender<T> {
    /// Whether the item will be taken; if not, nobody wants more.
    pub(crate) fn send(&self, item: T) -> bool {
        self.0.send(item).is_ok()
    }
}

impl<T: Send + 'static> Prefetch<T> {
    /// Starts `make` on a thread, which is at most `ahead` items ahead.
    pub(crate) fn start(
        name: &str,
        ahead: usize,
        make: impl FnOnce(&ItemSender<T>) -> Result<()> + Send + 'static,
    ) -> Result<Prefetch<T>> {
        let (sender, items) = sync_channel(ahead);
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || make(&ItemSender(sender)))
            .map_err(|error| Error::internal(format!("cannot start a thread: {error}")))?;
        Ok(Prefetch { items, thread: Some(thread) })
    }

    /// The next item; none at the end.
    ///
    /// # Errors
    /// The thread failed, behind all of its items.
    pub(crate) fn next(&mut self) -> Result<Option<T>> {
        if let Ok(item) = self.items.recv() {
            return Ok(Some(item));
        }
        let Some(thread) = self.thread.take() else { return Ok(None) };
        thread.join().unwrap_or_else(|panic| resume_unwind(panic)).map(|()| None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_comes_behind_the_items_and_the_end_behind_it() {
        let mut items = Prefetch::start("test", 1, |to| {
            (0..3).for_each(|item| assert!(to.send(item)));
            Err(Error::invalid("three are enough"))
        })
        .unwrap();
        for item in 0..3 {
            assert_eq!(items.next().unwrap(), Some(item));
        }
        assert!(items.next().unwrap_err().to_string().contains("three"));
        assert_eq!(items.next().unwrap(), None);
    }

    #[test]
    #[should_panic(expected = "no end")]
    fn a_panic_is_no_end() {
        let mut items = Prefetch::<()>::start("test", 1, |_| panic!("no end")).unwrap();
        let _ = items.next();
    }
}
