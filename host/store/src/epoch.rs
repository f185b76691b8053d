//! Epochs: how a writer learns that no reader can still see what it has taken away, without
//! any reader ever waiting. It does not know what is protected by it.
//!
//! Readers count themselves in and out of one of two counters, that of the epoch's parity, and look
//! at the epoch again once they are counted: so a reader that goes on is counted under the epoch
//! that it saw. The writer begins the next epoch only when nobody is left in the last but one. What
//! was taken away in epoch `e` can be seen by readers of `e` and before; once the epoch is `e + 2`
//! they have all gone. Counters are striped by thread, each on its own cache lines, so readers do
//! not slow one another.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

const STRIPES: usize = 32;

#[derive(Debug, Default)]
#[repr(align(128))]
struct Stripe {
    /// Readers by the parity of their epoch.
    readers: [AtomicU64; 2],
}

/// What readers of one store enter.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    current: AtomicU64,
    stripes: [Stripe; STRIPES],
}

/// A reader within an epoch. What it saw stays until it is dropped.
#[derive(Debug)]
pub(crate) struct EpochPin<'a> {
    readers: &'a AtomicU64,
}

impl Drop for EpochPin<'_> {
    fn drop(&mut self) {
        self.readers.fetch_sub(1, SeqCst);
    }
}

impl Epochs {
    /// Enters. It tries again only where the epoch changed between two instructions, so it never
    /// waits for anybody.
    #[inline]
    pub fn pin(&self) -> EpochPin<'_> {
        let stripe = &self.stripes[stripe()];
        loop {
            let epoch = self.current.load(SeqCst);
            let readers = &stripe.readers[epoch as usize % 2];
            readers.fetch_add(1, SeqCst);
            if self.current.load(SeqCst) == epoch {
                return EpochPin { readers };
            }
            readers.fetch_sub(1, SeqCst);
        }
    }

    /// The epoch that something taken away now belongs to.
    pub fn current(&self) -> u64 {
        self.current.load(SeqCst)
    }

    /// Begins the next epoch, if nobody is left in the last but one; gives the current one. The
    /// writer's alone.
    pub fn advance(&self) -> u64 {
        let epoch = self.current();
        let before = (epoch + 1) as usize % 2;
        if self.stripes.iter().all(|stripe| stripe.readers[before].load(SeqCst) == 0) {
            self.current.store(epoch + 1, SeqCst);
            return epoch + 1;
        }
        epoch
    }

    /// Whether what was taken away in `epoch` is out of sight.
    pub fn is_past(&self, epoch: u64) -> bool {
        self.current() >= epoch + 2
    }

    /// Waits until every reader that is within now has gone. Gives up, with false, after
    /// `patience`.
    pub fn wait(&self, patience: Duration) -> bool {
        let from = self.current();
        let until = Instant::now() + patience;
        while !self.is_past(from) {
            if self.advance() < from + 2 {
                if Instant::now() > until {
                    return false;
                }
                std::thread::yield_now();
            }
        }
        true
    }
}

/// A number for this thread.
fn stripe() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static STRIPE: Cell<usize> = Cell::new(NEXT.fetch_add(1, SeqCst) % STRIPES);
    }
    STRIPE.get()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_reader_may_see_is_not_past() {
        let epochs = Epochs::default();
        let pin = epochs.pin();
        let taken = epochs.current();
        for _ in 0..5 {
            epochs.advance();
        }
        assert!(!epochs.is_past(taken));
        assert!(!epochs.wait(Duration::ZERO));
        let later = epochs.pin();
        drop(pin);
        for _ in 0..5 {
            epochs.advance();
        }
        assert!(epochs.is_past(taken), "the later reader came after it was taken away");
        assert!(!epochs.wait(Duration::ZERO));
        drop(later);
        assert!(epochs.wait(Duration::from_secs(10)));
    }
}
