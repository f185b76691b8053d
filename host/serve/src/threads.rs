//! Threads with names, and a thread behind a bounded queue.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread::JoinHandle,
};

use crate::error::{CommonErrors as _, Error, Result};

/// Starts a thread.
///
/// # Errors
/// The system has no thread left; the error is internal.
pub(crate) fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|error| Error::internal(format!("cannot start thread `{name}`: {error}")))
}

/// Waits for the end of a thread. If it panicked, the log has the panic already.
pub(crate) fn join(thread: JoinHandle<()>) {
    let _ = thread.join();
}

/// Runs a job whose panic must not end the calling thread; logs `message` if it panics.
pub(crate) fn survive_panic(message: &'static str, run: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        tracing::error!("{message}");
    }
}

/// A thread that works off a bounded queue. Dropping it finishes what is queued.
pub(crate) struct QueueThread<T> {
    /// Taken by drop alone, so that the thread sees the end of the queue.
    queue: Option<SyncSender<T>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> QueueThread<T> {
    /// Starts the thread; `run` receives the other end of the queue.
    pub(crate) fn start(
        name: &str,
        capacity: usize,
        run: impl FnOnce(Receiver<T>) + Send + 'static,
    ) -> Result<Self> {
        let (queue, jobs) = sync_channel(capacity);
        let thread = spawn(name, move || run(jobs))?;
        Ok(Self { queue: Some(queue), thread: Some(thread) })
    }

    /// Queues a job.
    ///
    /// # Errors
    /// The queue is full, or the thread has ended.
    pub(crate) fn try_send(&self, job: T) -> std::result::Result<(), TrySendError<T>> {
        self.queue.as_ref().expect("drop alone takes the queue").try_send(job)
    }
}

impl<T> Drop for QueueThread<T> {
    fn drop(&mut self) {
        drop(self.queue.take());
        self.thread.take().into_iter().for_each(join);
    }
}
