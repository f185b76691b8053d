//! A job on a thread of its own.

use std::thread::{self, JoinHandle};

use crate::{
    error::{CommonErrors as _, Error, Result},
    simulated,
};

/// A job on a thread of its own. A simulated host does it at once.
#[derive(Debug)]
pub enum BackgroundJob<T> {
    /// The thread that does it.
    Started(JoinHandle<T>),
    /// The result of a job that was done at once.
    Done(T),
}

impl<T: Send + 'static> BackgroundJob<T> {
    /// Starts a job.
    ///
    /// # Errors
    /// The system has no thread left; the error is internal.
    pub fn start(name: &str, run: impl FnOnce() -> T + Send + 'static) -> Result<Self> {
        if simulated::is_entered() {
            return Ok(Self::Done(run()));
        }
        let thread = thread::Builder::new().name(name.into()).spawn(run);
        thread
            .map(Self::Started)
            .map_err(|error| Error::internal(format!("cannot start thread `{name}`: {error}")))
    }

    /// Whether it has ended, in whatever way.
    pub fn is_finished(&self) -> bool {
        match self {
            Self::Started(thread) => thread.is_finished(),
            Self::Done(_) => true,
        }
    }

    /// Waits for its end. An error means that it panicked; the log has the panic already.
    pub fn join(self) -> thread::Result<T> {
        match self {
            Self::Started(thread) => thread.join(),
            Self::Done(result) => Ok(result),
        }
    }
}
