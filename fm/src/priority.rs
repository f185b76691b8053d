//! Thread priorities: threads that answer requests go before threads that prepare new weights or
//! versions.

/// Lowers the priority of the calling thread and of all threads that it starts later; it must not
/// start threads that answer requests. Does nothing on systems without per-thread priorities.
pub fn lower_thread_priority() {
    // Start the shared thread pool now: started by this thread later, it would inherit the
    // priority.
    rayon::current_num_threads();
    hypercast_core::clock::lower_priority();
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
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
}
