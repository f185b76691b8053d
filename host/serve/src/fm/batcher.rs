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
};
use tokio::sync::oneshot;

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::Metrics,
    request::api::{Refusal, RequestResult},
    threads::{QueueThread, survive_panic},
};

/// A request's examples (one, or several of a caller that batches itself), and where its result
/// goes.
struct InferJob {
    examples: Arc<[Example]>,
    deadline: Instant,
    reply: oneshot::Sender<RequestResult<FmOutput>>,
}

impl InferJob {
    fn candidates(&self) -> usize {
        self.examples.iter().map(|example| example.targets.len()).sum()
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
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(config.threads)
            .thread_name(|index| format!("fm-{index}"))
            .build()
            .map_err(|error| Error::internal(format!("cannot start the FM's threads: {error}")))?;
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
    pub async fn infer(
        &self,
        examples: Arc<[Example]>,
        deadline: Instant,
    ) -> RequestResult<FmOutput> {
        let (reply, answer) = oneshot::channel();
        self.thread.try_send(InferJob { examples, deadline, reply }).map_err(
            |error| match error {
                TrySendError::Full(_) => Refusal::Overloaded { retry_after_ms: 100 },
                TrySendError::Disconnected(_) => {
                    Refusal::Internal("the FM's thread has ended; see the host's log".into())
                }
            },
        )?;
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
        let until = (Instant::now() + self.wait).min(first.deadline);
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
            batch.into_iter().partition(|job| job.deadline > now && !job.reply.is_closed());
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
        let examples: Vec<&Example> = jobs.iter().flat_map(|job| job.examples.iter()).collect();
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
