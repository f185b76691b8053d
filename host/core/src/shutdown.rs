//! Cooperative shutdown: SIGTERM, SIGINT or the program itself request it, and long jobs look for
//! it between steps, finish the step and save.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    error::{CommonErrors as _, Error, Result},
    supervised_thread::{self, OnPanic},
};

/// Whether shutdown was requested. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    requested: Arc<AtomicBool>,
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

    /// Requests shutdown; every clone sees it.
    pub fn request(&self) {
        self.requested.store(true, Ordering::Release);
    }

    /// Whether shutdown was requested.
    pub fn is_requested(&self) -> bool {
        self.requested.load(Ordering::Acquire)
    }
}
