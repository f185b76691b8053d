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

/// The fewest examples of a task whose NE is held against that of the base rate.
const BASE_RATE_EXAMPLES: u64 = 1000;

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
            let verdict = match evaluate(&evaluation) {
                Ok(Verdict::Publish) => {
                    Ok(above_base_rate(&evaluation.slices).map_or(Verdict::Publish, Verdict::Hold))
                }
                verdict => verdict,
            };
            EvaluateCall { verdict, took: clock::since(start) }
        })?);
        Ok(())
    }
}

/// Says that a version is no better than the base rate, nor than the version before: its plugin
/// publishes it, and an operator may, but no rollout does by itself. `None` where too few outcomes
/// say so.
fn above_base_rate(slices: &[Slice]) -> Option<String> {
    let whole = slices.iter().filter(|slice| slice.surface.is_none());
    let tasks: Vec<&Slice> = whole.filter(|slice| slice.examples >= BASE_RATE_EXAMPLES).collect();
    let nes: Vec<f64> = tasks.iter().filter_map(|slice| slice.candidate.ne).collect();
    let gain = |slice: &&Slice| Some(slice.serving.as_ref()?.ne? - slice.candidate.ne?);
    let gain: f64 = tasks.iter().filter_map(gain).sum();
    let mean = nes.iter().sum::<f64>() / nes.len() as f64;
    (!nes.is_empty() && mean >= 1.0 && gain <= 0.0).then(|| {
        format!(
            "the mean NE of its tasks is {mean:.4}, no better than that of the base rate; \
             `hypercast versions promote` does it all the same"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_expert::wasm::contract::Quality;

    #[test]
    fn what_is_worse_than_the_base_rate_is_held_unless_it_is_an_improvement() {
        let quality =
            |ne| Quality { ne: Some(ne), auc: None, gauc: None, calibration: None, mse: None };
        let slice = |examples, candidate, serving: Option<f64>| Slice {
            task: "click".into(),
            surface: None,
            examples,
            candidate: quality(candidate),
            serving: serving.map(quality),
        };
        let held = |slice: Slice| above_base_rate(&[slice]).is_some();
        assert!(held(slice(1000, 1.02, None)) && held(slice(1000, 1.02, Some(0.9))));
        assert!(!held(slice(1000, 1.02, Some(1.1))), "it is better than what serves");
        assert!(!held(slice(1000, 0.99, None)));
        assert!(!held(slice(999, 1.02, None)), "too few say so");
        assert!(above_base_rate(&[]).is_none());
    }
}
