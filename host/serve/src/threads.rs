//! Threads with names, a thread behind a bounded queue, and values that threads share.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

use hypercast_core::{
    shutdown::Shutdown,
    supervised_thread::{self, OnPanic},
};

use crate::error::Result;

/// Waits for the end of a thread. If it panicked, the log has the panic already.
pub(crate) fn join<T>(thread: JoinHandle<T>) {
    let _ = thread.join();
}

/// Runs a job whose panic must not end the calling thread; logs `message` if it panics.
pub(crate) fn survive_panic(message: &'static str, run: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        tracing::error!("{message}");
    }
}

/// Threads that share a stop flag. Dropping the group stops them and waits for their end.
#[derive(Default)]
pub(crate) struct ThreadGroup {
    /// Asks the threads to stop.
    pub(crate) stop: Shutdown,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl ThreadGroup {
    /// A group that also stops when `stop` says so.
    pub(crate) fn ending_with(stop: Shutdown) -> Self {
        Self { stop, threads: Mutex::default() }
    }

    /// Starts a thread, which must end once the flag is set. If it panics, the process is not
    /// ready.
    pub(crate) fn spawn(
        &self,
        name: &str,
        run: impl FnOnce(&Shutdown) + Send + 'static,
    ) -> Result<()> {
        let stop = self.stop.clone();
        let run = move || run(&stop);
        lock(&self.threads).push(supervised_thread::spawn(name, OnPanic::NotReady, run)?);
        Ok(())
    }

    /// Stops the threads and waits for their end.
    pub(crate) fn stop(&self) {
        self.stop.request();
        let threads = std::mem::take(&mut *lock(&self.threads));
        threads.into_iter().for_each(join);
    }
}

impl Drop for ThreadGroup {
    fn drop(&mut self) {
        self.stop();
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
        on_panic: OnPanic,
        run: impl FnOnce(Receiver<T>) + Send + 'static,
    ) -> Result<Self> {
        let (queue, jobs) = sync_channel(capacity);
        let thread = supervised_thread::spawn(name, on_panic, move || run(jobs))?;
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

/// Locks a value that is usable even if a thread panicked while it held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A value that is replaced as a whole while others use it: a request reads it once and keeps what
/// it got.
#[derive(Debug)]
pub(crate) struct Current<T>(RwLock<Arc<T>>);

impl<T> Current<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(RwLock::new(Arc::new(value)))
    }

    pub(crate) fn now(&self) -> Arc<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Replaces the value. The old one is dropped outside the lock, since that may take long.
    pub(crate) fn replace(&self, value: T) {
        let new = Arc::new(value);
        let old =
            std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), new);
        drop(old);
    }
}
