//! A plugin's own verdict on a version that serves. Its `evaluate` runs on a thread of its own, one
//! call at a time for each rollout, so that commands, rollbacks and other rollouts never wait for a
//! guest. A breaker rests a plugin whose `evaluate` fails again and again.

use std::time::{Duration, Instant};

use hypercast_core::{background_job::BackgroundJob, clock};
use hypercast_expert::{
    BreakerConfig, ExpertFault, Fault,
    breaker::{Breaker, FailedCall},
    cpu_budget,
    wasm::contract::{Decision, Evaluation, Verdict},
};
use hypercast_fm::base_rate;

use super::serving::MeasuredSlice;
use crate::error::Result;

/// The fewest examples of a task whose error is held against that of the base rate.
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
        slices: impl FnOnce() -> Vec<MeasuredSlice>,
    ) -> Result<()> {
        let is_due = self.started.is_none_or(|at| now - at >= EVERY);
        if self.running.is_some() || !is_due || !self.breaker.admit(now) {
            return Ok(());
        }
        (self.started, self.calls) = (Some(now), self.calls + 1);
        let measured = slices();
        let slices = measured.iter().map(|own| own.slice.clone()).collect();
        let evaluation = Evaluation { decision: Decision::Canary, slices };
        self.running = Some(BackgroundJob::start("evaluate", move || {
            cpu_budget::on_long_call(clock::lower_priority);
            let start = clock::instant();
            let verdict = match evaluate(&evaluation) {
                Ok(Verdict::Publish) => {
                    Ok(above_base_rate(&measured).map_or(Verdict::Publish, Verdict::Hold))
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
fn above_base_rate(slices: &[MeasuredSlice]) -> Option<String> {
    let is_enough = |own: &&MeasuredSlice| {
        own.slice.surface.is_none() && own.slice.examples >= BASE_RATE_EXAMPLES
    };
    let tasks = || slices.iter().filter(is_enough);
    let gain: f64 = tasks().filter_map(|own| Some(own.error_before? - own.error?)).sum();
    let why = base_rate::no_better(tasks().filter_map(|own| own.error))
        .filter(|_| base_rate::is_no_gain(gain))?;
    Some(format!("{why}; `hypercast versions promote` does it all the same"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_expert::wasm::contract::{Quality, Slice};

    #[test]
    fn what_is_worse_than_the_base_rate_is_held_unless_it_is_an_improvement() {
        let told = Quality { ne: None, auc: None, gauc: None, calibration: None, mse: None };
        let slice = |examples, error, error_before| MeasuredSlice {
            error: Some(error),
            error_before,
            slice: Slice {
                task: "click".into(),
                surface: None,
                examples,
                candidate: told,
                serving: None,
            },
        };
        let held = |slice| above_base_rate(&[slice]).is_some();
        assert!(held(slice(1000, 1.02, None)) && held(slice(1000, 1.02, Some(0.9))));
        assert!(!held(slice(1000, 1.02, Some(1.1))), "it is better than what serves");
        assert!(!held(slice(1000, 0.99, None)));
        assert!(held(slice(1000, f64::NAN, Some(1.1))), "nothing is known of it");
        assert!(!held(slice(999, 1.02, None)), "too few say so");
        assert!(above_base_rate(&[]).is_none());
    }
}
