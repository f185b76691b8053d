//! Which threads go first where cores are few: those that answer. What prepares new weights or versions gives way.

/// How far such a thread steps back, in the system's own measure (0 is the usual, 19 the last).
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// The calling thread gives way to all others from now on, and so do the threads that it starts: it must start none that
/// answer. It does nothing on systems that have no priority by thread.
pub fn give_way() {
    // The pool that all share would be started by whoever uses it first, and step back with it.
    rayon::current_num_threads();
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call takes plain numbers and touches no memory of ours. 0 is the calling thread, as Linux has a priority a thread.
        let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0;
        if failed {
            tracing::debug!(
                "a background thread keeps the usual priority: the system refused another"
            );
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn the_calling_thread_alone_steps_back() {
        // SAFETY: as above; it only asks.
        let now = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = now();
        let inside = std::thread::spawn(move || {
            super::give_way();
            now()
        });
        let inside = inside.join().unwrap();
        assert_eq!((inside, now()), (super::NICE.max(before), before));
    }
}
