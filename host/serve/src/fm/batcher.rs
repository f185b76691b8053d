//! Batches requests to the FM. Requests wait in one bounded queue; each forward pass takes as many
//! as fit, and none whose deadline has passed.
//!
//! Batching does not change a result (to 1e-5), and a request that does not fit the model fails
//! alone.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TrySendError},
    },
    time::{Duration, Instant},
};

use hypercast_config::FmTierConfig;
use hypercast_core::supervised_thread::OnPanic;
use hypercast_fm::{
    example::Example,
    inference::{FmOutput, FoundationModel},
    threads::start_pool,
};
use tokio::sync::oneshot;

use crate::{
    error::Result,
    fm::FmRequest,
    metrics::Metrics,
    request::api::{Refusal, RequestResult},
    threads::{QueueThread, survive_panic},
};

/// A request, and where its result goes.
struct InferJob {
    request: FmRequest,
    reply: oneshot::Sender<RequestResult<FmOutput>>,
}

impl InferJob {
    fn candidates(&self) -> usize {
        self.request.examples.iter().map(|example| example.targets.len()).sum()
    }
}

/// An FM behind a queue. Dropping it finishes what is queued.
pub struct FmBatcher {
    /// The FM itself, which takes weight updates between two passes.
    pub(crate) fm: Arc<dyn FoundationModel>,
    thread: QueueThread<InferJob>,
}

impl FmBatcher {
    /// Starts the tier's threads.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn start(
        fm: Arc<dyn FoundationModel>,
        config: &FmTierConfig,
        metrics: Arc<Metrics>,
    ) -> Result<Self> {
        let pool = start_pool("fm", config.threads)?;
        let worker = BatchWorker {
            fm: fm.clone(),
            pool,
            most: config.batch_candidates,
            wait: Duration::from_micros(config.batch_wait_us),
            metrics,
        };
        let run = move |jobs| worker.work(&jobs);
        let thread = QueueThread::start("fm-batch", config.queue, OnPanic::EndProcess, run)?;
        Ok(Self { fm, thread })
    }

    /// The FM's predictions and TAEs for the examples' targets, in order.
    ///
    /// # Errors
    /// The queue is full, the deadline passes, or an example does not fit the model.
    pub async fn infer(&self, request: FmRequest) -> RequestResult<FmOutput> {
        let ((reply, answer), deadline) = (oneshot::channel(), request.deadline);
        self.thread.try_send(InferJob { request, reply }).map_err(|error| match error {
            TrySendError::Full(_) => Refusal::Overloaded { retry_after_ms: 100 },
            TrySendError::Disconnected(_) => {
                Refusal::Internal("the FM's thread has ended; see the host's log".into())
            }
        })?;
        match tokio::time::timeout_at(deadline.into(), answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(Refusal::Internal("the FM failed; see the host's log".into())),
            Err(_) => Err(Refusal::Deadline),
        }
    }
}

/// Collects requests into batches and runs them.
struct BatchWorker {
    fm: Arc<dyn FoundationModel>,
    pool: rayon::ThreadPool,
    most: usize,
    wait: Duration,
    metrics: Arc<Metrics>,
}

impl BatchWorker {
    fn work(self, jobs: &Receiver<InferJob>) {
        let mut held = None;
        while let Some(first) = held.take().or_else(|| jobs.recv().ok()) {
            let (batch, next) = self.gather(first, jobs);
            held = next;
            self.metrics.fm_batches.observe(batch.len() as f64);
            // A batch that panics fails its own requests alone.
            survive_panic("a pass of the FM panicked; its callers get an error", || {
                self.answer(batch);
            });
        }
    }

    /// The batch that begins with `first`, and the first request that no longer fits it.
    fn gather(
        &self,
        first: InferJob,
        jobs: &Receiver<InferJob>,
    ) -> (Vec<InferJob>, Option<InferJob>) {
        let until = (Instant::now() + self.wait).min(first.request.deadline);
        let mut candidates = first.candidates();
        let mut batch = vec![first];
        while candidates < self.most {
            let job = match jobs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            };
            candidates += job.candidates();
            if candidates > self.most {
                return (batch, Some(job));
            }
            batch.push(job);
        }
        (batch, None)
    }

    fn answer(&self, batch: Vec<InferJob>) {
        let now = Instant::now();
        let (jobs, late): (Vec<InferJob>, Vec<InferJob>) =
            batch.into_iter().partition(|job| job.request.deadline > now && !job.reply.is_closed());
        for job in late {
            // The caller may have gone.
            let _ = job.reply.send(Err(Refusal::Deadline));
        }
        match self.infer(&jobs) {
            Ok(outputs) => {
                for (job, output) in jobs.into_iter().zip(outputs) {
                    let _ = job.reply.send(Ok(output));
                }
            }
            Err(_) if jobs.len() > 1 => jobs.into_iter().for_each(|job| self.answer(vec![job])),
            Err(error) => {
                for job in jobs {
                    let _ = job.reply.send(Err(Refusal::of_fm(&error)));
                }
            }
        }
    }

    /// Runs one pass and splits its output by request.
    fn infer(&self, jobs: &[InferJob]) -> hypercast_fm::Result<Vec<FmOutput>> {
        let examples: Vec<&Example> =
            jobs.iter().flat_map(|job| job.request.examples.iter()).collect();
        let fm = &*self.fm;
        let output = self.pool.install(|| fm.infer(&examples))?;
        let manifest = self.fm.manifest();
        let (width, tasks) = (manifest.config.tae_width(), manifest.spec.main_tasks().len());
        let mut from = 0;
        let part = |job: &InferJob| {
            let rows = from..from + job.candidates();
            from = rows.end;
            FmOutput {
                tae: output.tae[rows.start * width..rows.end * width].to_vec(),
                main: output.main[rows.start * tasks..rows.end * tasks].to_vec(),
            }
        };
        Ok(jobs.iter().map(part).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc::channel};

    use hypercast_fm::{checkpoint::FmManifest, history::CacheCounts, update::WeightUpdate};

    use super::*;
    use crate::{http::bodies::BodyBudget, threads::lock};

    /// An FM whose first pass lasts until it is let go, and whose passes fail.
    struct BlockedFm {
        gate: Mutex<Receiver<()>>,
    }

    impl FoundationModel for BlockedFm {
        fn manifest(&self) -> &FmManifest {
            unreachable!("no pass succeeds")
        }

        fn current_manifest(&self) -> Arc<FmManifest> {
            unreachable!("nobody asks")
        }

        fn update(&self, _: WeightUpdate) -> hypercast_fm::Result<()> {
            Ok(())
        }

        fn infer(&self, _: &[&Example]) -> hypercast_fm::Result<FmOutput> {
            // It ends with the other end of the channel.
            let _ = lock(&self.gate).recv();
            Err(hypercast_fm::Error::Update("the pass failed".into()))
        }

        fn infer_uncached(&self, examples: &[&Example]) -> hypercast_fm::Result<FmOutput> {
            self.infer(examples)
        }

        fn cache_counts(&self) -> CacheCounts {
            CacheCounts::default()
        }

        fn check_files(&self) -> hypercast_fm::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn what_waits_for_the_fm_keeps_its_memory_although_its_caller_has_left() {
        const MIB: usize = 1 << 20;
        let (go_on, gate) = channel::<()>();
        let metrics = Arc::new(Metrics::default());
        let fm = Arc::new(BlockedFm { gate: Mutex::new(gate) });
        let config = FmTierConfig { threads: 1, batch_wait_us: 0, ..FmTierConfig::default() };
        let batcher = FmBatcher::start(fm, &config, metrics.clone()).unwrap();
        let budget = BodyBudget::new(2 * MIB, &metrics);
        let in_flight = |mib: usize| {
            let line = format!("hypercast_inflight_body_bytes {}\n", mib * MIB);
            let text = metrics.render(None);
            assert!(text.contains(&line), "{line}{text}");
        };
        for _ in 0..2 {
            let body = budget.read(vec![7; MIB].into(), MIB).await.unwrap();
            let _reserved = Some(Arc::new(body.into_reserved()));
            let deadline = Instant::now() + Duration::from_secs(60);
            let asks = batcher.infer(FmRequest { examples: [].into(), deadline, _reserved });
            let left = tokio::time::timeout(Duration::from_millis(20), asks).await;
            assert!(left.is_err(), "the caller leaves before it is answered");
        }
        in_flight(2);
        let full = budget.read("x".into(), MIB).await.err();
        assert!(matches!(full, Some(Refusal::BodiesFull { .. })), "{full:?}");
        drop(go_on);
        // It finishes what is queued.
        drop(batcher);
        in_flight(0);
    }
}
