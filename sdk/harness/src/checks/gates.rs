//! Schedule and evaluation: what decides how training goes on and whether it serves
//! answers every question that the host may ask.

use super::Checked;
use crate::contract::{Decision, Evaluation, Quality, Slice, TrainingStep};
use crate::error::{Failure, Place};
use crate::harness::Harness;

const CHECK: &str = "gates";
const FACTOR: &str =
    "`schedule` gives a finite factor in 0..=10 for every step: a fault leaves the host's rate";
const VERDICT: &str =
    "`evaluate` answers whatever was measured, also nothing: a fault holds back what was trained";

/// Steps of a training that is looked at.
const PLANNED: u64 = 1_000;

/// What cannot be measured is none.
const NOTHING: Quality = Quality { ne: None, auc: None, gauc: None, calibration: None, mse: None };

impl Harness {
    /// Every step of a training on logs, and of one behind a stream, has a factor in 0..=10; every evaluation, with and
    /// without examples or a version that serves, has a verdict.
    ///
    /// # Errors
    /// The first that has not.
    pub fn check_gates(&self) -> Checked {
        let fail =
            |seen, advice| Err(Failure { check: CHECK, place: Place::default(), seen, advice });
        for (taken, planned) in
            (0..=PLANNED).step_by(50).flat_map(|taken| [(taken, PLANNED), (taken * 1_000, 0)])
        {
            let step = TrainingStep {
                taken,
                planned,
                trained_rows: taken * 512,
                rows: 512,
                learning_rate: 1e-3,
            };
            let at = format!("step {taken} of {planned}");
            match self.schedule(step) {
                Ok(factor) if (0.0..=10.0).contains(&factor) => {}
                Ok(factor) => return fail(format!("{at}: factor {factor}"), FACTOR),
                Err(fault) => return fail(format!("{at}: {fault}"), FACTOR),
            }
        }
        for (name, evaluation) in self.evaluations() {
            if let Err(fault) = self.evaluate(&evaluation) {
                return fail(format!("{name}: {fault}"), VERDICT);
            }
        }
        Ok(())
    }

    fn evaluations(&self) -> Vec<(&'static str, Evaluation)> {
        let good = Quality {
            ne: Some(0.8),
            auc: Some(0.7),
            gauc: Some(0.6),
            calibration: Some(1.0),
            mse: Some(0.1),
        };
        let of = |examples, candidate: Quality, serving: Option<Quality>| {
            let tasks = self.description().tasks.iter();
            let slice = |task: &crate::contract::Task| Slice {
                task: task.name.clone(),
                surface: None,
                examples,
                candidate,
                serving,
            };
            tasks.map(slice).collect::<Vec<_>>()
        };
        let evaluations = [
            ("nothing measured", Vec::new()),
            ("no example", of(0, NOTHING, None)),
            ("nothing serves", of(10_000, good, None)),
            ("as good as what serves", of(10_000, good, Some(good))),
            ("other measures than what serves has", of(10_000, NOTHING, Some(good))),
        ];
        let both = |(name, slices): (&'static str, Vec<Slice>)| {
            [Decision::Publication, Decision::Canary]
                .map(|decision| (name, Evaluation { decision, slices: slices.clone() }))
        };
        evaluations.into_iter().flat_map(both).collect()
    }
}
