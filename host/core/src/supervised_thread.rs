//! Threads and tasks that live as long as the process. If one panics, the process either ends or
//! reports that it is not ready; it never goes on in silence without that thread.

use std::{
    collections::BTreeSet,
    sync::{Mutex, PoisonError},
    thread::{self, JoinHandle},
};

use crate::error::{CommonErrors as _, Error, Result};

/// The names of the threads that are lost. It is global because the process as a whole is not
/// ready, whichever of its parts started the thread.
static LOST: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

/// What the panic of a thread means for its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnPanic {
    /// The process goes on, but its probe of readiness names the thread ([`lost_threads`]). For
    /// threads without which requests are still answered.
    NotReady,
    /// The process ends at once, as if it were killed, so that its supervisor restarts it. For
    /// threads without which nothing works, and for processes without a probe of readiness.
    EndProcess,
}

/// Starts a thread that is supervised to its end.
///
/// # Errors
/// The system has no thread left; the error is internal.
pub fn spawn<T: Send + 'static>(
    name: &str,
    on_panic: OnPanic,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>> {
    let panic_watch = PanicWatch::new(name, on_panic);
    let run = move || {
        let _watched = panic_watch;
        run()
    };
    thread::Builder::new()
        .name(name.into())
        .spawn(run)
        .map_err(|error| Error::internal(format!("cannot start thread `{name}`: {error}")))
}

/// Notes that a thread has given up its work for good, without a panic, for a reason that the log
/// has: the process is not ready any more.
pub fn report_lost(name: &str) {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into());
}

/// The supervised threads and tasks that have panicked or given up, by name. A process that misses
/// one is not ready.
pub fn lost_threads() -> Vec<String> {
    LOST.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}

/// Supervises the thread or the async task that holds it. Dropping it without a panic does nothing.
#[derive(Debug)]
pub struct PanicWatch {
    name: String,
    on_panic: OnPanic,
}

impl PanicWatch {
    /// A watch for a thread or task with this name.
    pub fn new(name: &str, on_panic: OnPanic) -> Self {
        Self { name: name.into(), on_panic }
    }
}

impl Drop for PanicWatch {
    fn drop(&mut self) {
        if !thread::panicking() {
            return;
        }
        let thread = self.name.as_str();
        match self.on_panic {
            OnPanic::NotReady => {
                tracing::error!(
                    thread,
                    "a thread has panicked; this process is not ready any more, restart it"
                );
                report_lost(thread);
            }
            OnPanic::EndProcess => {
                tracing::error!(
                    thread,
                    "a thread has panicked that this process cannot do without; it ends now"
                );
                std::process::abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_thread_that_panics_is_named_and_one_that_ends_is_not() {
        let panics = spawn("panics", OnPanic::NotReady, || panic!("as a bug would")).unwrap();
        let ends = spawn("ends", OnPanic::NotReady, || 5).unwrap();
        assert!(panics.join().is_err());
        assert_eq!(ends.join().unwrap(), 5);
        let lost = lost_threads();
        assert!(lost.contains(&"panics".into()) && !lost.contains(&"ends".into()), "{lost:?}");
        report_lost("gives up");
        assert!(lost_threads().contains(&"gives up".into()));
    }

    #[test]
    fn a_task_that_panics_is_named() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let task = runtime.spawn(async {
            let _watched = PanicWatch::new("task", OnPanic::NotReady);
            tokio::task::yield_now().await;
            panic!("as a bug would");
        });
        assert!(runtime.block_on(task).is_err());
        assert!(lost_threads().contains(&"task".into()));
    }

    /// Set in the process that must end.
    const CHILD: &str = "HYPERCAST_TEST_ENDS";

    #[test]
    fn a_thread_that_nothing_works_without_ends_the_process() {
        if std::env::var_os(CHILD).is_some() {
            let _ =
                spawn("vital", OnPanic::EndProcess, || panic!("as a bug would")).unwrap().join();
            std::process::exit(0);
        }
        let own = "supervised_thread::tests::a_thread_that_nothing_works_without_ends_the_process";
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", own])
            .env(CHILD, "1")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(!ended.success(), "{ended}");
    }
}
