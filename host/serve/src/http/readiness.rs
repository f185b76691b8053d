//! The check of files behind `/readyz`. It reads files, so one runs at a time, however many probes
//! ask; the others get its answer.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{sync::Mutex, task::JoinError};

/// How old an answer may be that is given again.
const FRESH: Duration = Duration::from_millis(500);

/// What the last check found.
#[derive(Default)]
pub(crate) struct FileCheck(Arc<Mutex<Option<FileState>>>);

struct FileState {
    at: Instant,
    lost: Vec<String>,
}

impl FileCheck {
    /// What is wrong with files: what `check` finds, or what another check found a moment ago.
    ///
    /// # Errors
    /// The check panicked.
    pub(crate) async fn lost(
        &self,
        check: impl FnOnce() -> Vec<String> + Send + 'static,
    ) -> Result<Vec<String>, JoinError> {
        let mut last = self.0.clone().lock_owned().await;
        if let Some(state) = last.as_ref().filter(|state| state.at.elapsed() < FRESH) {
            return Ok(state.lost.clone());
        }
        // The check keeps its turn if the probe that asked for it goes away.
        let check = move || {
            let lost = check();
            *last = Some(FileState { at: Instant::now(), lost: lost.clone() });
            lost
        };
        tokio::task::spawn_blocking(check).await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    };

    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_check_at_a_time_answers_all_probes_and_is_made_anew_later() {
        let (files, checks) = (Arc::new(FileCheck::default()), Arc::new(AtomicUsize::new(0)));
        let (go_on, waits) = channel::<()>();
        let (begun, begins) = channel();
        let counted = checks.clone();
        let first_files = files.clone();
        let first = tokio::spawn(async move {
            let check = move || {
                counted.fetch_add(1, Ordering::SeqCst);
                begun.send(()).unwrap();
                waits.recv().unwrap();
                vec!["a file".into()]
            };
            first_files.lost(check).await
        });
        tokio::task::spawn_blocking(move || begins.recv().unwrap()).await.unwrap();
        // Its probe goes away, and others come.
        first.abort();
        let probe = || {
            let (files, counted) = (files.clone(), checks.clone());
            tokio::spawn(async move {
                let check = move || {
                    counted.fetch_add(1, Ordering::SeqCst);
                    Vec::new()
                };
                files.lost(check).await.unwrap()
            })
        };
        let others: Vec<_> = (0..20).map(|_| probe()).collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(checks.load(Ordering::SeqCst), 1, "they wait for the first one");
        go_on.send(()).unwrap();
        for other in others {
            assert_eq!(other.await.unwrap(), ["a file"]);
        }
        assert_eq!(checks.load(Ordering::SeqCst), 1);
        tokio::time::sleep(FRESH).await;
        assert_eq!(probe().await.unwrap(), [""; 0]);
        assert_eq!(checks.load(Ordering::SeqCst), 2);
    }
}
