//! How a long job is asked to stop: by SIGTERM or SIGINT, or by who started it.
//!
//! It is asked, not interrupted: the job looks now and then, finishes its step, and saves.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::signal::unix::{SignalKind, signal};

use crate::error::{CommonErrors as _, Error, Result};

/// Whether to stop. Clones are of one and the same.
#[derive(Debug, Clone, Default)]
pub struct Stop {
    asked: Arc<AtomicBool>,
}

impl Stop {
    /// One that SIGTERM and SIGINT ask, too.
    ///
    /// # Errors
    /// A system that gives no signal or thread.
    pub fn on_signals() -> Result<Stop> {
        let cannot =
            |error: std::io::Error| Error::invalid(format!("cannot watch signals: {error}"));
        let stop = Stop::default();
        let asked = stop.clone();
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
                        // The default would be to end at once, without saving.
                        _ = hangup.recv() => tracing::warn!("SIGHUP: this process reads its configuration at its start alone; restart it"),
                    }
                }
            });
            asked.ask();
        };
        std::thread::Builder::new().name("signals".into()).spawn(watch).map_err(cannot)?;
        Ok(stop)
    }

    /// Asks.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::Release);
    }

    /// Whether it was asked.
    pub fn is_asked(&self) -> bool {
        self.asked.load(Ordering::Acquire)
    }
}
