//! The threads that run requests. Models and Wasm block, so they never run on the server's async
//! threads.
//!
//! The queue is bounded: a full one refuses at once. What need not delay an answer has places of
//! its own in it, so that it takes none from a request that was admitted. A thread that runs a
//! guest for long is replaced in the pool; it ends after its job and runs at a lower priority until
//! then.

use std::{
    cell::{Cell, RefCell},
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::{self, JoinHandle},
};

use hypercast_core::{
    clock,
    supervised_thread::{self, OnPanic},
};
use hypercast_expert::cpu_budget;
use tokio::sync::Semaphore;

use crate::{
    error::Result,
    request::api::{Refusal, RequestResult},
    threads::{join, lock, survive_panic},
};

type RequestJob = Box<dyn FnOnce() + Send>;

/// A fixed number of threads on a bounded queue. Dropping it finishes what is queued.
pub struct Workers {
    queue: Option<SyncSender<RequestJob>>,
    /// The places of jobs that wait: those that a caller waits for, and those that nobody does.
    places: Arc<Semaphore>,
    later_places: Arc<Semaphore>,
    pool: Arc<WorkerPool>,
}

impl Workers {
    /// Starts so many threads, before which at most `queue` jobs wait, and as many of those that
    /// nobody waits for. As many more threads may have been replaced and still run a job.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn start(threads: usize, queue: usize) -> Result<Self> {
        let [places, later_places] = [queue; 2].map(|most| Arc::new(Semaphore::new(most)));
        let (queue, jobs) = sync_channel::<RequestJob>(2 * queue);
        let (jobs, most) = (Mutex::new(jobs), 2 * threads);
        let pool = Arc::new(WorkerPool { jobs, threads: Mutex::default(), most });
        for index in 0..threads {
            pool.spawn(&mut lock(&pool.threads), &format!("rank-{index}"))?;
        }
        Ok(Self { queue: Some(queue), places, later_places, pool })
    }

    /// Queues a job.
    ///
    /// # Errors
    /// [`Refusal::Overloaded`] if the queue is full; the job is dropped.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) -> RequestResult<()> {
        self.queue_at(&self.places, job)
    }

    /// Queues a job that nobody waits for; it is dropped if too many of these wait.
    pub fn submit_later(&self, job: impl FnOnce() + Send + 'static) {
        // It is left out under load.
        let _ = self.queue_at(&self.later_places, job);
    }

    fn queue_at(
        &self,
        places: &Arc<Semaphore>,
        job: impl FnOnce() + Send + 'static,
    ) -> RequestResult<()> {
        let overloaded = || Refusal::Overloaded { retry_after_ms: 100 };
        let place = places.clone().try_acquire_owned().map_err(|_| overloaded())?;
        let job = move || {
            drop(place);
            job();
        };
        let queue = self.queue.as_ref().expect("only drop takes the queue");
        queue.try_send(Box::new(job)).map_err(|_| overloaded())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        drop(self.queue.take());
        loop {
            // The lock is not held during the join, because a thread that ends removes itself.
            let Some(thread) = lock(&self.pool.threads).pop() else { return };
            join(thread);
        }
    }
}

struct WorkerPool {
    jobs: Mutex<Receiver<RequestJob>>,
    /// The threads that take jobs, and the replaced ones that still run.
    threads: Mutex<Vec<JoinHandle<()>>>,
    most: usize,
}

thread_local! {
    /// The pool that this thread takes jobs from, and whether it was replaced in it.
    static POOL: RefCell<Option<Arc<WorkerPool>>> = const { RefCell::new(None) };
    static LEFT: Cell<bool> = const { Cell::new(false) };
}

impl WorkerPool {
    fn spawn(self: &Arc<Self>, threads: &mut Vec<JoinHandle<()>>, name: &str) -> Result<()> {
        let pool = self.clone();
        let thread = supervised_thread::spawn(name, OnPanic::EndProcess, move || {
            POOL.set(Some(pool.clone()));
            cpu_budget::on_long_call(leave);
            pool.work();
        })?;
        threads.push(thread);
        Ok(())
    }

    fn work(&self) {
        while !LEFT.get() {
            let Ok(job) = lock(&self.jobs).recv() else { return };
            // A panic must not end the thread, which would cost capacity.
            survive_panic("a request panicked; its caller gets an error, the thread goes on", job);
        }
        let own = thread::current().id();
        lock(&self.threads).retain(|thread| thread.thread().id() != own);
    }
}

/// Replaces the calling thread in its pool, unless as many as the pool has were replaced already.
fn leave() {
    let Some(pool) = POOL.with_borrow(Clone::clone) else { return };
    let mut threads = lock(&pool.threads);
    if LEFT.get() || threads.len() >= pool.most {
        return;
    }
    let name = thread::current().name().unwrap_or("rank").to_owned();
    match pool.spawn(&mut threads, &name) {
        Ok(()) => {
            LEFT.set(true);
            // After the new thread has started, because it would inherit the priority.
            clock::lower_priority();
        }
        Err(error) => {
            tracing::warn!(%error, "a thread with a long call cannot be replaced; it stays in the pool")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};

    /// Occupies a thread until something is sent; then its job ends with `end`.
    fn occupy(workers: &Workers, end: impl FnOnce() + Send + 'static) -> Sender<()> {
        let (release, gate) = channel::<()>();
        let (started, running) = channel();
        workers
            .submit(move || {
                started.send(()).unwrap();
                gate.recv().unwrap();
                end();
            })
            .unwrap();
        running.recv().unwrap();
        release
    }

    #[test]
    fn what_nobody_waits_for_takes_no_place_of_a_request() {
        let workers = Workers::start(1, 1).unwrap();
        let release = occupy(&workers, || ());
        let (done, ran) = channel();
        for _ in 0..2 {
            let done = done.clone();
            workers.submit_later(move || done.send("later").unwrap());
        }
        workers.submit(move || done.send("request").unwrap()).unwrap();
        release.send(()).unwrap();
        drop(workers);
        assert_eq!(ran.iter().collect::<Vec<_>>(), ["later", "request"], "the second was dropped");
    }

    #[test]
    fn a_full_queue_refuses_and_a_panic_costs_no_thread() {
        let workers = Workers::start(1, 1).unwrap();
        let release = occupy(&workers, || panic!("as a faulty request would"));
        let (done, after) = channel();
        workers.submit(move || done.send(()).unwrap()).unwrap();
        let refused = workers.submit(|| ()).unwrap_err();
        assert!(matches!(refused, Refusal::Overloaded { .. }), "one runs, one waits: {refused:?}");
        release.send(()).unwrap();
        after.recv().unwrap();
    }

    #[test]
    fn a_thread_with_a_long_call_leaves_its_place_to_another_and_ends_after_its_job() {
        let workers = Workers::start(1, 4).unwrap();
        let (release, gate) = channel::<()>();
        let (started, running) = channel();
        workers
            .submit(move || {
                leave();
                leave();
                started.send(thread::current().id()).unwrap();
                gate.recv().unwrap();
            })
            .unwrap();
        let long = running.recv().unwrap();
        let (done, after) = channel();
        let started_on = done.clone();
        workers.submit(move || started_on.send(thread::current().id()).unwrap()).unwrap();
        let other = after.recv().unwrap();
        assert_ne!(other, long, "another thread took the job while the first was held");
        // As many as the pool has are replaced: this one stays and takes the next job, too.
        for _ in 0..2 {
            let started_on = done.clone();
            let job = move || {
                leave();
                started_on.send(thread::current().id()).unwrap();
            };
            workers.submit(job).unwrap();
            assert_eq!(after.recv().unwrap(), other);
        }
        release.send(()).unwrap();
        let pool = workers.pool.clone();
        drop(workers);
        assert_eq!(lock(&pool.threads).len(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_thread_that_left_goes_behind_and_its_successor_does_not() {
        // SAFETY: the call takes numbers alone; 0 is the calling thread.
        let niceness = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = niceness();
        let workers = Workers::start(1, 4).unwrap();
        let (done, after) = channel();
        let started_on = done.clone();
        workers
            .submit(move || {
                leave();
                started_on.send(niceness()).unwrap();
            })
            .unwrap();
        assert!(after.recv().unwrap() > before);
        workers.submit(move || done.send(niceness()).unwrap()).unwrap();
        assert_eq!(after.recv().unwrap(), before);
    }
}
