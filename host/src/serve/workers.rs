//! The threads that run requests. Models and Wasm block, so they never run on
//! the server's async workers.
//!
//! The queue is bounded: a full one refuses at once instead of growing.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

type Job = Box<dyn FnOnce() + Send>;

/// A fixed pool over a bounded queue; dropping it finishes what is queued.
pub struct Workers {
    queue: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

/// The queue is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Busy;

/// The size of a pool.
#[derive(Debug, Clone, Copy)]
pub struct PoolSize {
    /// Threads.
    pub threads: usize,
    /// Jobs that may wait.
    pub queue: usize,
}

impl Workers {
    /// Starts the threads.
    pub fn start(size: PoolSize) -> std::io::Result<Self> {
        let (queue, jobs) = sync_channel::<Job>(size.queue);
        let jobs = Arc::new(Mutex::new(jobs));
        let threads = (0..size.threads)
            .map(|index| {
                let jobs = jobs.clone();
                std::thread::Builder::new().name(format!("rank-{index}")).spawn(move || work(&jobs))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { queue: Some(queue), threads })
    }

    /// Queues a job.
    ///
    /// # Errors
    /// [`Busy`] if the queue is full; the job is dropped.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) -> Result<(), Busy> {
        let queue = self.queue.as_ref().expect("only drop takes the queue");
        match queue.try_send(Box::new(job)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(Busy),
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.queue.take());
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

fn work(jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = match jobs.lock() {
            Ok(jobs) => jobs.recv(),
            Err(_) => return,
        };
        let Ok(job) = job else { return };
        // A job that panics must not take its thread, and with it capacity, away.
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
            tracing::error!("a request panicked; its caller gets an error, the thread goes on");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_full_queue_refuses_and_a_panic_costs_no_thread() {
        let workers = Workers::start(PoolSize { threads: 1, queue: 1 }).unwrap();
        let (release, gate) = channel::<()>();
        let (started, running) = channel();
        workers
            .submit(move || {
                started.send(()).unwrap();
                gate.recv().unwrap();
                panic!("as a faulty request would");
            })
            .unwrap();
        running.recv().unwrap();
        let (done, after) = channel();
        workers.submit(move || done.send(()).unwrap()).unwrap();
        assert_eq!(workers.submit(|| ()), Err(Busy), "one runs, one waits");
        release.send(()).unwrap();
        after.recv().unwrap();
    }
}
