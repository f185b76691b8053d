//! Shadows: versions that see requests after their answers and are only measured. They have one
//! thread and a short queue; a full queue drops requests and counts them, so an answer never waits.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, mpsc::Receiver},
    time::{Duration, Instant},
};

use hypercast_core::{logging::RepeatedFailures, supervised_thread::OnPanic};
use hypercast_expert::RankOutcome;
use hypercast_fm::inference::FmOutput;
use hypercast_stream::registry::user_bucket;
use tokio::runtime::Handle;

use crate::{
    error::Result,
    fm::FmRequest,
    http::reload::Settings,
    metrics::{
        Metrics,
        prediction_log::{ArmPredictions, PredictionLog},
    },
    request::service::{Fetched, by_task},
    threads::{QueueThread, lock, survive_panic},
    versions::serving_set::ServedFm,
};

/// An answered request for the shadows.
pub struct ShadowRequest {
    /// The request, and the set that answered it.
    pub fetched: Arc<Fetched>,
    /// The output of the FM that it was answered with.
    pub fm: Option<Arc<FmOutput>>,
}

/// The queue of the shadows. Dropping it ends its thread.
pub struct ShadowQueue {
    thread: QueueThread<ShadowRequest>,
    share: f64,
    metrics: Arc<Metrics>,
}

/// What the shadows' thread needs.
pub(crate) struct ShadowWorker {
    /// Share and queue of the shadows, and the deadline of requests, which a reload may change.
    pub(crate) settings: Arc<Settings>,
    /// The runtime for calls to FMs in other processes.
    pub(crate) handle: Handle,
    /// Receives the predictions.
    pub(crate) log: Arc<PredictionLog>,
    /// Counts requests and failures.
    pub(crate) metrics: Arc<Metrics>,
    /// What was told of FMs that fail.
    pub(crate) failures: Mutex<RepeatedFailures>,
}

impl ShadowQueue {
    /// Starts the thread.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub(crate) fn start(worker: ShadowWorker) -> Result<Self> {
        let (config, metrics) = (worker.settings.now(), worker.metrics.clone());
        let (share, queue) = (config.server.shadow_share, config.server.shadow_queue.max(1));
        let run = move |jobs| worker.work(&jobs);
        let thread = QueueThread::start("shadow", queue, OnPanic::NotReady, run)?;
        Ok(Self { thread, share, metrics })
    }

    /// Queues a request if it is in the sample, some version is a shadow for it, and there is room.
    pub fn offer(&self, request: ShadowRequest) {
        let (set, example) = (&request.fetched.set, &request.fetched.example[0]);
        let any = !set.shadows(example.surface).is_empty() || set.shadow_fms().next().is_some();
        if !any || user_bucket(example.request, "shadows") >= self.share {
            return;
        }
        let kept = self.thread.try_send(request).is_ok();
        let what = if kept { "seen" } else { "dropped" };
        self.metrics.shadows.with_label_values(&[what]).inc();
    }
}

impl ShadowWorker {
    fn work(self, jobs: &Receiver<ShadowRequest>) {
        while let Ok(request) = jobs.recv() {
            survive_panic("a shadow version panicked; its request was answered before", || {
                self.measure(&request);
            });
        }
    }

    fn measure(&self, request: &ShadowRequest) {
        let (set, example) = (&request.fetched.set, &request.fetched.example[0]);
        let items: Vec<u64> = example.targets.iter().map(|target| target.item.id).collect();
        let keep = |predicted| self.log.keep(example.request, &items, predicted);
        let mut outputs: HashMap<&str, Option<Arc<FmOutput>>> = HashMap::new();
        outputs.insert(request.fetched.fm().version(), request.fm.clone());
        for fm in set.shadow_fms() {
            let output =
                outputs.entry(fm.version()).or_insert_with(|| self.infer(fm, &request.fetched));
            if let Some(output) = output {
                keep(of_fm(fm, output));
            }
        }
        for arm in set.shadows(example.surface) {
            let fm = set.fm(&arm.fm).expect("a set has the FMs that its experts pin");
            let output =
                outputs.entry(fm.version()).or_insert_with(|| self.infer(fm, &request.fetched));
            // The shadow does all the work of an answer, so that faults are request before it
            // serves.
            let answer = output.as_deref().map(|output| fm.aligned(output));
            let (outcome, spent) =
                arm.expert().serve(example, arm.fm_rows(answer.as_ref()), items.len());
            arm.count(&outcome, spent);
            match outcome {
                RankOutcome::Ranked { predictions, .. } => {
                    let tasks = by_task(&predictions);
                    keep(ArmPredictions { arm: arm.label.clone(), tasks });
                }
                RankOutcome::Degraded(fault) => {
                    self.metrics.shadows.with_label_values(&["failed"]).inc();
                    // `hypercast plugin logs` shows the newest faults.
                    tracing::debug!(%fault, arm = arm.label, "a shadow expert failed; its request was answered before");
                }
            }
        }
    }

    fn infer(&self, fm: &ServedFm, fetched: &Fetched) -> Option<Arc<FmOutput>> {
        let deadline_ms = self.settings.now().server.deadline_ms;
        let until = Instant::now() + Duration::from_millis(deadline_ms);
        let examples = fetched.core.clone();
        let request = FmRequest { examples, deadline: until, _reserved: None };
        match self.handle.block_on(fm.tier.infer(request)) {
            Ok(output) => Some(Arc::new(output)),
            Err(refusal) => {
                self.metrics.shadows.with_label_values(&["failed"]).inc();
                // The figures of a refusal differ from request to request.
                let kind = format!("{} {}", fm.version(), refusal.code().1);
                if lock(&self.failures).is_news(&kind) {
                    tracing::warn!(%refusal, fm = fm.version(), "a shadow's FM failed");
                }
                None
            }
        }
    }
}

/// An FM's own predictions as those of an arm.
pub(crate) fn of_fm(fm: &ServedFm, output: &FmOutput) -> ArmPredictions {
    let tasks = fm.tasks();
    let column =
        |task: usize| output.main.iter().skip(task).step_by(tasks.len()).copied().collect();
    let tasks = tasks.iter().enumerate().map(|(at, spec)| (spec.name.clone(), column(at)));
    ArmPredictions { arm: format!("fm@{}", fm.version()), tasks: tasks.collect() }
}
