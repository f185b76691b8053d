//! Shadows: versions that see real requests after their answers, and whose
//! predictions are only measured. One thread and a short queue: a full one drops requests and counts them, and
//! never slows an answer.

use std::{
    collections::HashMap,
    sync::{Arc, mpsc::Receiver},
    time::{Duration, Instant},
};

use hypercast_expert::RankOutcome;
use hypercast_fm::inference::FmOutput;
use hypercast_stream::versions::place;
use tokio::runtime::Handle;

use crate::{
    error::Result,
    metrics::{
        Metrics,
        prediction_log::{ArmPredictions, PredictionLog, ShownItems},
    },
    request::service::{Fetched, by_task},
    threads::{QueueThread, survive_panic},
    versions::serving_set::ServedFm,
};

/// A request that was answered.
pub struct ShadowRequest {
    /// The request, and the set that answered it.
    pub fetched: Arc<Fetched>,
    /// What its FM said.
    pub fm: Option<Arc<FmOutput>>,
}

/// The shadows' lane; dropping it ends its thread.
pub struct ShadowQueue {
    thread: QueueThread<ShadowRequest>,
    share: f64,
    metrics: Arc<Metrics>,
}

/// What the lane needs.
pub struct ShadowWorker {
    /// The share of the requests that shadows see.
    pub share: f64,
    /// Requests that may wait.
    pub queue: usize,
    /// How long an FM may take for one.
    pub deadline: Duration,
    /// Where FMs in other processes are asked from.
    pub handle: Handle,
    /// Where predictions go.
    pub log: Arc<PredictionLog>,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
}

impl ShadowQueue {
    /// Starts the lane's thread.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(worker: ShadowWorker) -> Result<Self> {
        let (share, metrics) = (worker.share, worker.metrics.clone());
        let thread =
            QueueThread::start("shadow", worker.queue.max(1), move |jobs| worker.work(&jobs))?;
        Ok(Self { thread, share, metrics })
    }

    /// Shows a request to the shadows that there are for it, if it is of their share and there is room.
    pub fn offer(&self, seen: ShadowRequest) {
        let (set, example) = (&seen.fetched.set, &seen.fetched.example[0]);
        let any = !set.shadows(example.surface).is_empty() || set.shadow_fms().next().is_some();
        if !any || place(example.request, "shadows") >= self.share {
            return;
        }
        let kept = self.thread.try_send(seen).is_ok();
        self.metrics.shadow(if kept { "seen" } else { "dropped" });
    }
}

impl ShadowWorker {
    fn work(self, jobs: &Receiver<ShadowRequest>) {
        while let Ok(seen) = jobs.recv() {
            survive_panic("a shadow version panicked; its request was answered before", || {
                self.measure(&seen);
            });
        }
    }

    fn measure(&self, seen: &ShadowRequest) {
        let (set, example) = (&seen.fetched.set, &seen.fetched.example[0]);
        let items: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        let keep = |predicted| {
            self.log.keep(ShownItems { request: example.request, items: &items }, predicted);
        };
        let mut said: HashMap<&str, Option<Arc<FmOutput>>> = HashMap::new();
        said.insert(seen.fetched.fm().version(), seen.fm.clone());
        for fm in set.shadow_fms() {
            let output = said.entry(fm.version()).or_insert_with(|| self.infer(fm, &seen.fetched));
            if let Some(output) = output {
                keep(of_fm(fm, output));
            }
        }
        for arm in set.shadows(example.surface) {
            let fm = set.fm(&arm.fm).expect("a set has the FMs that its experts pin");
            let output = said.entry(fm.version()).or_insert_with(|| self.infer(fm, &seen.fetched));
            let rows = output.as_ref().map(|output| &*output.tae);
            // All of it, as if it answered: what would fault is to be known before it does.
            let (outcome, spent) = arm.expert().serve(example, arm.tae(rows), items.len());
            arm.count(&outcome, spent);
            match outcome {
                RankOutcome::Ranked { predictions, .. } => {
                    let tasks = by_task(&predictions);
                    keep(ArmPredictions { arm: arm.label.clone(), tasks });
                }
                RankOutcome::Degraded(fault) => {
                    self.metrics.shadow("failed");
                    tracing::warn!(%fault, arm = arm.label, "a shadow expert failed; its request was answered before");
                }
            }
        }
    }

    fn infer(&self, fm: &ServedFm, fetched: &Fetched) -> Option<Arc<FmOutput>> {
        let until = Instant::now() + self.deadline;
        match self.handle.block_on(fm.tier.infer(fetched.example.clone(), until)) {
            Ok(output) => Some(Arc::new(output)),
            Err(refusal) => {
                self.metrics.shadow("failed");
                tracing::warn!(%refusal, fm = fm.version(), "a shadow's FM failed");
                None
            }
        }
    }
}

/// An FM's own predictions, as those of an arm.
pub(crate) fn of_fm(fm: &ServedFm, output: &FmOutput) -> ArmPredictions {
    let tasks = fm.tasks();
    let column =
        |task: usize| output.main.iter().skip(task).step_by(tasks.len()).copied().collect();
    let tasks = tasks.iter().enumerate().map(|(at, spec)| (spec.name.clone(), column(at)));
    ArmPredictions { arm: format!("fm@{}", fm.version()), tasks: tasks.collect() }
}
