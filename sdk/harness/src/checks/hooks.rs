//! Checks of the training hooks. `labels` and `sample` must use known outcomes only; `schedule`,
//! `evaluate` and `evaluate_rows` must answer every question that the host may ask.

use super::CheckResult;
use crate::cases::Case;
use crate::contract::{Decision, Evaluation, Quality, Slice, Task, TaskLabels, TrainingStep};
use crate::error::{Failure, FailureLocation};
use crate::harness::Harness;

const CHECK: &str = "labels";
const FAULT: &str =
    "`labels` and `sample` must answer every batch: an error stops the expert's training";
const UNKNOWN: &str =
    "set the mask to 0 if the outcome is not known (`batch.known`, NaN in `batch.values`)";
const NEVER: &str = "with every outcome known, some examples must count: check the mask and the surfaces of the task";
const SHAPE: &str = "return one entry per task of the description, with a label and a mask per example, and either no weights or one per example";
const WEIGHT: &str = "a weight must be finite and not negative, with one for each example";
const PROBABILITY: &str = "a keep probability must be in 0..=1";

const GATES_CHECK: &str = "gates";
const FACTOR: &str = "`schedule` must return a finite factor in 0..=10 for every step: after a fault the host ignores it";
const VERDICT: &str = "`evaluate` must return a verdict for every evaluation, even without measurements: after a fault the parameters are held";
const SCORE: &str = "`validation_score` must return a finite score or none for every pass: an error ends the training";

/// The name of the evaluation of a pass of training.
const WITHOUT_SERVING: &str = "no serving version";

/// The number of steps of the training that `check_gates` checks.
const PLANNED: u64 = 1_000;

/// The quality when nothing could be measured.
const NOTHING: Quality = Quality { ne: None, auc: None, gauc: None, calibration: None, mse: None };

impl Harness {
    /// Checks that labels and masks depend on known outcomes only: unknown outcomes do not change
    /// them, a row without known outcomes does not count for any task, and a log with all outcomes
    /// known has examples of every task.
    ///
    /// # Errors
    /// The first label or mask that is wrong.
    pub fn check_labels(&self) -> CheckResult {
        let log = self.world.log(60, &self.surfaces());
        let labels = self.labelled(&log)?;
        self.unknown_changes_nothing(&log, &labels)?;
        self.nothing_known_masks_all(&log)?;
        self.all_known_counts(log)
    }

    fn unknown_changes_nothing(&self, log: &[Case], labels: &[TaskLabels]) -> CheckResult {
        let mut flipped = log.to_vec();
        each_outcome(&mut flipped, |outcome| outcome.actions ^= !outcome.known);
        for (one, two) in labels.iter().zip(&self.labelled(&flipped)?) {
            let differ = |row: &usize| {
                one.mask[*row] != two.mask[*row]
                    || one.mask[*row] != 0
                        && one.labels[*row].to_bits() != two.labels[*row].to_bits()
            };
            if let Some(row) = (0..one.mask.len()).find(differ) {
                let seen = format!(
                    "label {} (mask {}) became {} (mask {}) when an action that is not known changed",
                    one.labels[row], one.mask[row], two.labels[row], two.mask[row]
                );
                return Err(failure(self.row(log, row).task(&one.task), seen, UNKNOWN));
            }
        }
        Ok(())
    }

    fn nothing_known_masks_all(&self, log: &[Case]) -> CheckResult {
        let mut unknown = log.to_vec();
        each_outcome(&mut unknown, |outcome| *outcome = hypercast_fm::example::Outcome::UNKNOWN);
        for task in self.labelled(&unknown)? {
            if let Some(row) = task.mask.iter().position(|mask| *mask != 0) {
                let seen =
                    format!("label {} although no outcome of the row is known", task.labels[row]);
                return Err(failure(self.row(log, row).task(&task.task), seen, UNKNOWN));
            }
        }
        Ok(())
    }

    fn all_known_counts(&self, mut log: Vec<Case>) -> CheckResult {
        let (actions, values) = (self.info.actions.len(), self.info.values.len());
        each_outcome(&mut log, |outcome| {
            outcome.known = 1_u64.unbounded_shl(actions as u32).wrapping_sub(1);
            outcome.values[..values].iter_mut().filter(|v| v.is_nan()).for_each(|v| *v = 0.5);
        });
        for task in self.labelled(&log)? {
            if task.mask.iter().all(|mask| *mask == 0) {
                let seen = format!("none of {} examples counts", task.mask.len());
                return Err(failure(FailureLocation::default().task(&task.task), seen, NEVER));
            }
        }
        Ok(())
    }

    /// The labels of a log. Checks their shape and values, and the keep probabilities.
    fn labelled(&self, log: &[Case]) -> Result<Vec<TaskLabels>, Failure> {
        let rows: usize = log.iter().map(Case::candidates).sum();
        let fault = |fault| failure(FailureLocation::default(), fault, FAULT);
        let labels = self.labels(log).map_err(fault)?;
        for task in &self.description().tasks {
            let place = FailureLocation::default().task(&task.name);
            let found = labels.iter().filter(|entry| entry.task == task.name).collect::<Vec<_>>();
            let [entry] = found.as_slice() else {
                return Err(failure(place, format!("{} entries", found.len()), SHAPE));
            };
            let (l, m, w) = (entry.labels.len(), entry.mask.len(), entry.weights.len());
            if l != rows || m != rows || ![0, rows].contains(&w) {
                let seen = format!("{l} labels, {m} masks and {w} weights for {rows} examples");
                return Err(failure(place, seen, SHAPE));
            }
            let weight = |row: usize| entry.weights.get(row).copied().unwrap_or(1.0);
            let valid = |row: &usize| {
                entry.labels[*row].is_finite() && weight(*row).is_finite() && weight(*row) >= 0.0
            };
            let bad = (0..rows).find(|row| entry.mask[*row] != 0 && !valid(row));
            if let Some(row) = bad {
                let seen = format!("label {} with weight {}", entry.labels[row], weight(row));
                return Err(failure(self.row(log, row).task(&task.name), seen, UNKNOWN));
            }
        }
        let weights = self.weights(log).map_err(fault)?;
        for (task, own) in self.description().tasks.iter().zip(&weights) {
            let is_bad = |weight: &f32| !weight.is_finite() || *weight < 0.0;
            let bad = own.iter().find(|weight| is_bad(weight));
            if bad.is_some() || ![0, rows].contains(&own.len()) {
                let seen = format!("{} weights for {rows} examples, {bad:?} among them", own.len());
                return Err(failure(FailureLocation::default().task(&task.name), seen, WEIGHT));
            }
        }
        let keep = self.sample(log).map_err(fault)?;
        if let Some(row) = keep.iter().position(|keep| !(0.0..=1.0).contains(keep)) {
            let seen = format!("keep probability {}", keep[row]);
            return Err(failure(self.row(log, row), seen, PROBABILITY));
        }
        if ![0, rows].contains(&keep.len()) {
            let seen = format!("{} keep probabilities for {rows} examples", keep.len());
            return Err(failure(FailureLocation::default(), seen, SHAPE));
        }
        Ok(labels)
    }

    /// The location of a row of a log's batch.
    fn row(&self, log: &[Case], mut row: usize) -> FailureLocation {
        for case in log {
            if row < case.candidates() {
                return self.place(case).row(row);
            }
            row -= case.candidates();
        }
        FailureLocation::default().row(row)
    }

    /// Checks that `schedule` returns a factor in 0..=10 for every step, on logs and on a stream,
    /// and that `evaluate` returns a verdict for every evaluation, with and without examples or a
    /// serving version, as `evaluate_rows` does. And that `validation_score` returns a score, or
    /// none.
    ///
    /// # Errors
    /// The first step or evaluation without a valid answer.
    pub fn check_gates(&self) -> CheckResult {
        let fail =
            |seen, advice| Err(Failure::new(GATES_CHECK, FailureLocation::default(), seen, advice));
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
        let log = self.world.log(20, &self.surfaces());
        let rows = match self.evaluation_rows(&log) {
            Ok(rows) => rows,
            Err(fault) => return fail(format!("rows to evaluate: {fault}"), VERDICT),
        };
        for (name, evaluation) in self.evaluations() {
            let of_rows = self.evaluate_rows(&evaluation, &rows);
            if let Err(fault) = self.evaluate(&evaluation).and(of_rows) {
                return fail(format!("{name}: {fault}"), VERDICT);
            }
            // A training has no serving version, and figures of all tasks that it has rows of.
            if name == WITHOUT_SERVING
                && let Err(fault) = self.validation_score(&evaluation, &rows)
            {
                return fail(format!("{name}: {fault}"), SCORE);
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
            let slice = |task: &Task| Slice {
                task: task.name.clone(),
                surface: None,
                examples,
                candidate,
                serving,
            };
            tasks.map(slice).collect::<Vec<_>>()
        };
        let evaluations = [
            ("no slices", Vec::new()),
            ("no examples", of(0, NOTHING, None)),
            (WITHOUT_SERVING, of(10_000, good, None)),
            ("as good as the serving version", of(10_000, good, Some(good))),
            ("nothing measured but for the serving version", of(10_000, NOTHING, Some(good))),
        ];
        let both = |(name, slices): (&'static str, Vec<Slice>)| {
            [Decision::Publication, Decision::Canary]
                .map(|decision| (name, Evaluation { decision, slices: slices.clone() }))
        };
        evaluations.into_iter().flat_map(both).collect()
    }
}

fn each_outcome(log: &mut [Case], change: impl Fn(&mut hypercast_fm::example::Outcome)) {
    for case in log {
        case.example.targets.iter_mut().for_each(|target| change(&mut target.outcome));
    }
}

fn failure(place: FailureLocation, seen: String, advice: &'static str) -> Failure {
    Failure::new(CHECK, place, seen, advice)
}
