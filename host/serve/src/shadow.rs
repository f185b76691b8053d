//! Shadows: versions that see real requests after their answers, and whose
//! predictions are only measured. One thread and a short queue: a full one drops requests and counts them, and
//! never slows an answer.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use hypercast_fm::inference::FmOutput;
use tokio::runtime::Handle;

use super::{
    metrics::Metrics,
    served::{Predicted, Served, Shown},
    service::Fetched,
    set::ServedFm,
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_expert::RankOutcome;
use hypercast_stream::registry::user_bucket;

/// A request that was answered.
pub struct Seen {
    /// The request, and the set that answered it.
    pub fetched: Arc<Fetched>,
    /// What its FM said.
    pub fm: Option<Arc<FmOutput>>,
}

/// The shadows' lane; dropping it ends its thread.
pub struct Shadows {
    queue: Option<SyncSender<Seen>>,
    thread: Option<JoinHandle<()>>,
    share: f64,
    metrics: Arc<Metrics>,
}

/// What the lane needs.
pub struct Lane {
    /// The share of the requests that shadows see.
    pub share: f64,
    /// Requests that may wait.
    pub queue: usize,
    /// How long an FM may take for one.
    pub deadline: Duration,
    /// Where FMs in other processes are asked from.
    pub handle: Handle,
    /// Where predictions go.
    pub served: Arc<Served>,
    /// Where is counted.
    pub metrics: Arc<Metrics>,
}

impl Shadows {
    /// Starts the lane's thread.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(lane: Lane) -> Result<Self> {
        let (queue, jobs) = sync_channel(lane.queue.max(1));
        let (share, metrics) = (lane.share, lane.metrics.clone());
        let thread = std::thread::Builder::new()
            .name("shadow".into())
            .spawn(move || lane.work(&jobs))
            .map_err(|error| Error::invalid(format!("cannot start a thread: {error}")))?;
        Ok(Self { queue: Some(queue), thread: Some(thread), share, metrics })
    }

    /// Shows a request to the shadows that there are for it, if it is of their share and there is room.
    pub fn offer(&self, seen: Seen) {
        let (set, example) = (&seen.fetched.set, &seen.fetched.example[0]);
        let any = !set.shadows(example.surface).is_empty() || set.shadow_fms().next().is_some();
        if !any || user_bucket(example.request, "shadows") >= self.share {
            return;
        }
        let queue = self.queue.as_ref().expect("only drop takes the queue");
        let kept = queue.try_send(seen).is_ok();
        self.metrics.shadow(if kept { "seen" } else { "dropped" });
    }
}

impl Drop for Shadows {
    fn drop(&mut self) {
        drop(self.queue.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

impl Lane {
    fn work(self, jobs: &Receiver<Seen>) {
        while let Ok(seen) = jobs.recv() {
            let run = std::panic::AssertUnwindSafe(|| self.measure(&seen));
            if std::panic::catch_unwind(run).is_err() {
                tracing::error!("a shadow panicked; its request was answered before");
            }
        }
    }

    fn measure(&self, seen: &Seen) {
        let (set, example) = (&seen.fetched.set, &seen.fetched.example[0]);
        let items: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        let keep = |predicted| {
            self.served.keep(Shown { request: example.request, items: &items }, predicted);
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
                    let tasks = predictions.tasks.into_iter().map(|task| (task.task, task.values));
                    keep(Predicted { arm: arm.label.clone(), tasks: tasks.collect() });
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
pub(super) fn of_fm(fm: &ServedFm, output: &FmOutput) -> Predicted {
    let tasks = fm.tasks();
    let column =
        |task: usize| output.main.iter().skip(task).step_by(tasks.len()).copied().collect();
    let tasks = tasks.iter().enumerate().map(|(at, spec)| (spec.name.clone(), column(at)));
    Predicted { arm: format!("fm@{}", fm.version()), tasks: tasks.collect() }
}
