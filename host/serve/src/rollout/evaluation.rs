//! A plugin's own verdict on a version that serves. Its `evaluate` runs on a thread of its own, one
//! call at a time for each rollout, so that commands, rollbacks and other rollouts never wait for a
//! guest. A breaker rests a plugin whose `evaluate` fails again and again.

use std::time::{Duration, Instant};

use hypercast_core::clock;
use hypercast_expert::{
    BreakerConfig, ExpertFault, Fault,
    breaker::{Breaker, FailedCall},
    cpu_budget,
    wasm::contract::{Decision, Evaluation, Slice, Verdict},
};

use crate::{error::Result, threads::BackgroundJob};

/// Time between the starts of two evaluations.
const EVERY: Duration = Duration::from_secs(2);

/// Calls `evaluate` of a version's plugin.
pub type EvaluateFn =
    Box<dyn FnOnce(&Evaluation) -> std::result::Result<Verdict, ExpertFault> + Send>;

/// The evaluations of one step of a rollout.
pub(super) struct StepEvaluation {
    breaker: Breaker,
    running: Option<BackgroundJob<EvaluateCall>>,
    started: Option<Instant>,
    calls: u64,
    /// Why the step is held; also before the first verdict.
    pub(super) held: Option<String>,
}

/// A call that ended.
struct EvaluateCall {
    verdict: std::result::Result<Verdict, ExpertFault>,
    took: Duration,
}

impl StepEvaluation {
    /// No verdict yet; `breaker` limits calls that fail.
    pub(super) fn new(breaker: BreakerConfig) -> Self {
        let held = Some("its `evaluate` has not answered yet".to_owned());
        Self { breaker: Breaker::new(breaker), running: None, started: None, calls: 0, held }
    }

    /// The verdict of a call that has ended. A plugin that fails to give one holds its rollout.
    pub(super) fn verdict(&mut self, now: Instant) -> Option<Verdict> {
        let ended = self.running.take_if(|job| job.is_finished())?.join();
        let verdict = match ended {
            Ok(EvaluateCall { verdict: Ok(verdict), .. }) => {
                self.breaker.success(self.calls, now);
                verdict
            }
            Ok(EvaluateCall { verdict: Err(fault), took }) => {
                // That all instances are in use is not the plugin's fault.
                if !matches!(fault.cause, Fault::Busy(_)) {
                    // Each call counts as a user's: the breaker opens for faults of several.
                    self.breaker.fault(FailedCall { user: self.calls, at: now, cost: took });
                }
                Verdict::Hold(fault.to_string())
            }
            Err(_) => Verdict::Hold("its `evaluate` panicked; see the daemon's log".into()),
        };
        self.held = match &verdict {
            Verdict::Hold(why) => Some(why.clone()),
            Verdict::Publish | Verdict::RollBack(_) => None,
        };
        Some(verdict)
    }

    /// Starts the next call, if it is due and none runs.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(super) fn start(
        &mut self,
        now: Instant,
        evaluate: EvaluateFn,
        slices: impl FnOnce() -> Vec<Slice>,
    ) -> Result<()> {
        let is_due = self.started.is_none_or(|at| now - at >= EVERY);
        if self.running.is_some() || !is_due || !self.breaker.admit(now) {
            return Ok(());
        }
        (self.started, self.calls) = (Some(now), self.calls + 1);
        let evaluation = Evaluation { decision: Decision::Canary, slices: slices() };
        self.running = Some(BackgroundJob::start("evaluate", move || {
            cpu_budget::on_long_call(clock::lower_priority);
            let start = clock::instant();
            EvaluateCall { verdict: evaluate(&evaluation), took: clock::since(start) }
        })?);
        Ok(())
    }
}
