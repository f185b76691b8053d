//! Where threads run and which go first: each thread of a pool has a core of its own, and threads
//! that answer requests go before threads that prepare new weights or versions.
//!
//! Operations of a few milliseconds need all threads of their pool at once. A kernel that packs
//! threads on few cores, as those of some virtual machines do, or that balances load every few
//! milliseconds, would run two of them one after the other while a core is idle.

use rayon::{ThreadPool, ThreadPoolBuildError, ThreadPoolBuilder};

use crate::Result;

/// Starts the pool for operations outside of any other pool. It has a thread for each core, unless
/// `RAYON_NUM_THREADS` sets another number. Commands that serve, train and measure call it before
/// they compute. In others that pool starts with its first operation, and the kernel places it.
///
/// # Errors
/// The pool was started before, or its threads cannot be started.
pub fn start_shared_pool() -> Result<()> {
    let pool = on_own_cores(ThreadPoolBuilder::new()).thread_name(|index| format!("ops-{index}"));
    pool.build_global().map_err(|error| cannot_start("ops", &error))
}

/// Starts a pool of `threads` threads, or of one for each core if that is 0. They are named after
/// `name`.
///
/// # Errors
/// The threads cannot be started.
pub fn start_pool(name: &'static str, threads: usize) -> Result<ThreadPool> {
    let pool = on_own_cores(ThreadPoolBuilder::new().num_threads(threads));
    let pool = pool.thread_name(move |index| format!("{name}-{index}"));
    pool.build().map_err(|error| cannot_start(name, &error))
}

/// Lowers the priority of the calling thread and of all threads that it starts later; it must not
/// start threads that answer requests. Does nothing on systems without per-thread priorities.
pub fn lower_thread_priority() {
    // Start the shared thread pool now: started by this thread later, it would inherit the
    // priority.
    rayon::current_num_threads();
    hypercast_core::clock::lower_priority();
}

/// Binds each thread of the pool to a core, if it has as many threads as this process may use
/// cores. The threads of two smaller pools would share cores while others are idle.
fn on_own_cores(pool: ThreadPoolBuilder) -> ThreadPoolBuilder {
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    pool.start_handler(move |index| {
        if rayon::current_num_threads() == cores.len() {
            // A thread that cannot be bound runs anywhere, which is slower and as correct.
            core_affinity::set_for_current(cores[index]);
        }
    })
}

fn cannot_start(name: &str, error: &ThreadPoolBuildError) -> crate::Error {
    let why = format!("cannot start the pool of threads `{name}`: {error}");
    hypercast_core::Error::Internal(why).into()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::collections::HashSet;

    #[test]
    fn only_the_calling_thread_is_lowered() {
        // SAFETY: the call takes plain numbers and only reads the priority.
        let now = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = now();
        let inside = std::thread::spawn(move || {
            super::lower_thread_priority();
            now()
        });
        let inside = inside.join().unwrap();
        assert_eq!((inside, now()), (before.max(10), before));
    }

    /// The cores that each thread of a pool of `threads` may run on.
    fn cores_of(threads: usize) -> Vec<Vec<usize>> {
        let pool = super::start_pool("test", threads).unwrap();
        let own = || core_affinity::get_core_ids().unwrap().iter().map(|core| core.id).collect();
        pool.broadcast(|_| own())
    }

    #[test]
    fn a_pool_as_large_as_the_machine_has_a_thread_on_each_core() {
        let all = core_affinity::get_core_ids().unwrap().len();
        let own: HashSet<Vec<usize>> = cores_of(all).into_iter().collect();
        assert_eq!(own.len(), all);
        assert!(own.iter().all(|cores| cores.len() == 1), "{own:?}");
        assert!(cores_of(all + 1).iter().all(|cores| cores.len() == all));
    }
}
