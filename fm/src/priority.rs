//! Thread priorities: threads that answer requests go before threads that prepare new weights or
//! versions.

/// The nice value of a background thread; 0 is normal, 19 the lowest priority.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Lowers the priority of the calling thread and of all threads that it starts later; it must not
/// start threads that answer requests. Does nothing on systems without per-thread priorities.
pub fn lower_thread_priority() {
    // Start the shared thread pool now: started by this thread later, it would inherit the
    // priority.
    rayon::current_num_threads();
    #[cfg(target_os = "linux")]
    {
        // SAFETY: the call takes plain numbers and accesses no memory. 0 means the calling thread,
        // since Linux has a priority per thread.
        let checkpoint_error = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICE) } != 0;
        if checkpoint_error {
            tracing::debug!("cannot lower a background thread's priority; it keeps the normal one");
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #[test]
    fn only_the_calling_thread_is_lowered() {
        // SAFETY: as above; the call only reads the priority.
        let now = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = now();
        let inside = std::thread::spawn(move || {
            super::lower_thread_priority();
            now()
        });
        let inside = inside.join().unwrap();
        assert_eq!((inside, now()), (super::NICE.max(before), before));
    }
}
