//! Cooperative shutdown: SIGTERM, SIGINT or the program itself request it, and long jobs look for
//! it between steps, finish the step and save.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    error::{CommonErrors as _, Error, Result},
    supervised_thread::{self, OnPanic},
};

/// Whether shutdown was requested. Clones share one state.
#[derive(Clone, Default)]
pub struct Shutdown {
    requested: Arc<AtomicBool>,
    /// What else requests it.
    cause: Option<Arc<dyn Fn() -> bool + Send + Sync>>,
}

impl fmt::Debug for Shutdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Shutdown").field(&self.requested).finish()
    }
}

impl Shutdown {
    /// A shutdown that SIGTERM and SIGINT request, too.
    ///
    /// # Errors
    /// The system refuses a signal handler or a thread.
    pub fn on_signals() -> Result<Shutdown> {
        let cannot =
            |error: std::io::Error| Error::internal(format!("cannot watch signals: {error}"));
        let shutdown = Shutdown::default();
        let signalled = shutdown.clone();
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
        let (mut terminate, mut interrupt, mut hangup) = {
            let _within = runtime.enter();
            let watch = |kind| signal(kind).map_err(cannot);
            let hangup = watch(SignalKind::hangup())?;
            (watch(SignalKind::terminate())?, watch(SignalKind::interrupt())?, hangup)
        };
        let watch = move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = terminate.recv() => break,
                        _ = interrupt.recv() => break,
                        // By default SIGHUP would end the process at once, without saving.
                        _ = hangup.recv() => tracing::warn!(
                            "SIGHUP: this process reads its configuration only when it starts; \
                             restart it"
                        ),
                    }
                }
            });
            signalled.request();
        };
        supervised_thread::spawn("signals", OnPanic::EndProcess, watch)?;
        Ok(shutdown)
    }

    /// A shutdown of a part of this process: this one requests it, and so does `cause` once it
    /// returns true, which is asked each time that somebody looks.
    pub fn part(&self, cause: impl Fn() -> bool + Send + Sync + 'static) -> Shutdown {
        let whole = self.clone();
        let cause = Arc::new(move || whole.is_requested() || cause());
        Shutdown { requested: Arc::default(), cause: Some(cause) }
    }

    /// Requests shutdown; every clone sees it.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
    }

    /// Whether shutdown was requested.
    pub fn is_requested(&self) -> bool {
        if self.requested.load(Ordering::Acquire) {
            return true;
        }
        let is_caused = self.cause.as_ref().is_some_and(|cause| cause());
        if is_caused {
            self.request();
        }
        is_caused
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_ends_with_the_whole_or_by_its_own_cause_and_stays_so() {
        let (whole, due) = (Shutdown::default(), Arc::new(AtomicBool::new(false)));
        let of = due.clone();
        let part = whole.part(move || of.load(Ordering::Relaxed));
        let clone = part.clone();
        assert!(!part.is_requested());
        due.store(true, Ordering::Relaxed);
        assert!(clone.is_requested() && !whole.is_requested());
        due.store(false, Ordering::Relaxed);
        assert!(part.is_requested(), "it does not begin again");
        let other = whole.part(|| false);
        whole.request();
        assert!(other.is_requested());
    }
}
