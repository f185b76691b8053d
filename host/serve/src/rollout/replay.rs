//! The replay step: recorded requests through the new version and the one before it. It runs on a
//! thread of its own, because it may take minutes and commands must not wait for it.

use std::{path::PathBuf, sync::Arc};

use hypercast_core::{background_job::BackgroundJob, shutdown::Shutdown};
use hypercast_expert::ServedExpert;

use crate::{
    error::{CommonErrors as _, Error, Result},
    request_log::{self, RecordedRequest, ReplayExpert, ReplaySchema, ReplaySettings},
    rollout::{Acceptor, Rollout},
    versions::serving_set::ExpertArm,
};

/// Length of the top lists that a replay compares.
const TOP: usize = 10;

/// What a replay works on.
pub struct ReplayInput {
    /// The rollout at its replay step.
    pub rollout: Rollout,
    /// The expert of the push while it is still loaded; after a restart it is loaded again.
    pub expert: Option<Arc<ServedExpert>>,
    /// The version before, if it serves.
    pub before: Option<Arc<ExpertArm>>,
    /// The new version's surfaces, by index.
    pub surfaces: Vec<u16>,
    /// The folder of recorded requests.
    pub request_log: PathBuf,
    /// Loads the expert.
    pub acceptor: Arc<Acceptor>,
}

/// How a replay ended.
#[derive(Debug, PartialEq)]
pub enum ReplayVerdict {
    /// The version may go on; with a summary for the rollout's log.
    Passed(String),
    /// The version broke a limit.
    Failed(String),
}

/// A function that runs a replay until it ends or is cancelled.
pub type ReplayFn = fn(&ReplayInput, &Shutdown) -> Result<ReplayVerdict>;

/// A replay on its thread. Dropping it cancels the replay without waiting for its current request.
pub(super) struct ReplayTask {
    cancelled: Shutdown,
    job: Option<BackgroundJob<Result<ReplayVerdict>>>,
}

impl ReplayTask {
    pub(super) fn start(input: ReplayInput, replay: ReplayFn) -> Result<Self> {
        let cancelled = Shutdown::default();
        let cancel = cancelled.clone();
        let job = BackgroundJob::start("replay", move || replay(&input, &cancel))?;
        Ok(Self { cancelled, job: Some(job) })
    }

    /// The result, once; none while the replay runs.
    pub(super) fn result(&mut self) -> Option<Result<ReplayVerdict>> {
        let ended = self.job.take_if(|job| job.is_finished())?.join();
        let panicked = |_| Err(Error::internal("the replay panicked; see the daemon's log"));
        Some(ended.unwrap_or_else(panicked))
    }

    /// Cancels the replay and waits for its thread.
    pub(super) fn stop(mut self) {
        self.cancelled.request();
        self.job.take().into_iter().for_each(|job| drop(job.join()));
    }
}

impl Drop for ReplayTask {
    fn drop(&mut self) {
        self.cancelled.request();
    }
}

/// Replays recorded requests of the version's surfaces and FM, and stops at its first fault.
pub(super) fn run(input: &ReplayInput, cancelled: &Shutdown) -> Result<ReplayVerdict> {
    let (rollout, limits) = (&input.rollout, &input.rollout.limits);
    let version = &rollout.expert;
    let nothing = |why: &str| Ok(ReplayVerdict::Passed(format!("{why}: none was replayed")));
    if limits.replay_requests == 0 || !input.request_log.is_dir() {
        return nothing("no requests are recorded");
    }
    let schema = ReplaySchema::new(&input.acceptor.schema);
    let fits = |request: &RecordedRequest| {
        schema.has(request)
            && request.fm == version.fm
            && request.tae_dim == version.tae_dim
            && input.surfaces.contains(&request.example.surface)
    };
    let requests = request_log::newest(&input.request_log, limits.replay_requests, fits)?;
    if requests.is_empty() {
        return nothing("no requests of its surfaces and FM are recorded");
    }
    let requests: Vec<_> = requests.into_iter().map(|request| schema.upgraded(request)).collect();
    let expert = match &input.expert {
        Some(expert) => expert.clone(),
        None => Arc::new(input.acceptor.open(version)?),
    };
    let (label, without_tae) = (rollout.label(), version.without_tae);
    let before = input.before.as_ref().map(|arm| (arm, arm.expert()));
    let report = request_log::replay(
        &requests,
        ReplayExpert { expert: &expert, without_tae, label: &label },
        before.as_ref().map(|(arm, expert)| ReplayExpert {
            expert,
            without_tae: arm.desired.without_tae,
            label: &arm.label,
        }),
        &ReplaySettings { k: TOP, stop_at_fault: true, stop: &|| cancelled.is_requested() },
    );
    if let Some((cause, faults)) = report.faults.iter().next() {
        return Ok(ReplayVerdict::Failed(format!(
            "replay: recorded request {} of {} faulted ({cause}): {}",
            report.requests,
            requests.len(),
            faults.first
        )));
    }
    if let (Some(own), Some(before)) = (report.times, report.times_against) {
        // The median: on a busy machine, the p99 of a few hundred requests is noise.
        let most_us = limits.most_us(before.p50_us);
        if own.p50_us > most_us {
            return Ok(ReplayVerdict::Failed(format!(
                "replay: a recorded request takes {:.2} ms, {:.2} ms with the version before (at most {:.2} ms are allowed)",
                own.p50_us / 1e3,
                before.p50_us / 1e3,
                most_us / 1e3
            )));
        }
    }
    Ok(ReplayVerdict::Passed(format!(
        "{} recorded requests replayed against {}: {} of {} rankings differ, rank correlation {}",
        report.requests,
        report.against,
        report.differing,
        report.compared,
        report.rank_correlation.map_or("-".into(), |rho| format!("{rho:.3}"))
    )))
}
