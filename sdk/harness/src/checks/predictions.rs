//! Predictions: one a candidate, finite, and probabilities in 0..=1.

use super::Checked;
use crate::cases::Case;
use crate::contract::TaskKind;
use crate::error::Failure;
use crate::harness::Harness;

const CHECK: &str = "predictions";
const FAULT: &str = "the network must answer every request; run the same request with `Harness::native` in a debugger";
const NUMBER: &str = "keep what an exponential or a division sees in bounds (`clip`, a `Squash` or a normalisation before it)";
const ROWS: &str = "every task needs an output of shape [rows, 1]";

impl Harness {
    /// Every task has a finite prediction for every candidate, with parameters far from their beginnings; that of a binary
    /// task is a probability.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check_predictions(&self) -> Checked {
        self.cases().iter().chain(&self.largest()).try_for_each(|case| self.predicted(case, CHECK))
    }

    /// Checks the predictions of one request, in the name of a check.
    pub(super) fn predicted(&self, case: &Case, check: &'static str) -> Checked {
        let place = self.place(case);
        let fail = |place, seen: String, advice| Err(Failure { check, place, seen, advice });
        let predictions = match self.predict(case) {
            Ok(predictions) => predictions,
            Err(fault) => return fail(place, fault, FAULT),
        };
        for task in &self.description().tasks {
            let place = place.clone().task(&task.name);
            let Some(values) = predictions.task(&task.name) else {
                return fail(place, "no prediction".into(), ROWS);
            };
            if values.len() != case.candidates() {
                return fail(place, format!("{} predictions", values.len()), ROWS);
            }
            let valid = |value: &f32| match task.kind {
                TaskKind::Binary => (0.0..=1.0).contains(value),
                TaskKind::Regression => value.is_finite(),
            };
            if let Some(row) = values.iter().position(|value| !valid(value)) {
                return fail(place.row(row), format!("prediction {}", values[row]), NUMBER);
            }
        }
        Ok(())
    }
}
