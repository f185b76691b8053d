//! Checks of predictions: one per candidate, finite, and probabilities in 0..=1; also for requests
//! unlike any in training, with new ids, missing features, or without history or embeddings.

use std::sync::Arc;

use hypercast_data::schema::MISSING;

use super::CheckResult;
use crate::cases::Case;
use crate::contract::{Description, TaskKind};
use crate::error::Failure;
use crate::harness::Harness;

const CHECK: &str = "predictions";
const FAULT: &str =
    "the network must answer every request; debug the same request with `Harness::native`";
const NUMBER: &str =
    "limit the inputs of exponentials and divisions (with `clip`, a `Squash` or a normalisation)";
const ROWS: &str = "every task needs an output of shape [rows, 1]";

const UNKNOWN_CHECK: &str = "unknown features";
const UNKNOWN_FAULT: &str =
    "requests will have new items and missing features: look up by id with a default, not by index";

/// A modification of a request.
type CaseChange = fn(&mut Case);

/// The modifications that `check_unknown_features` makes, by name.
const CHANGES: [(&str, CaseChange); 6] = [
    ("ids never seen", |case| ids(case, |at| u64::MAX / 2 - at)),
    ("the largest ids", |case| ids(case, |_| i64::MAX as u64)),
    ("ids missing", |case| ids(case, |_| 0)),
    ("features missing", |case| features(case, |_| MISSING)),
    ("features far out", |case| features(case, |at| if at % 2 == 0 { 1e9 } else { -1e9 })),
    ("no embedding", |case| case.tae.fill(0.0)),
];

impl Harness {
    /// Checks that every task has a finite prediction for every candidate, and that those of binary
    /// tasks are probabilities. The parameters are far from their initial values.
    ///
    /// # Errors
    /// The first prediction that is missing or wrong.
    pub fn check_predictions(&self) -> CheckResult {
        self.cases().iter().chain(&self.largest()).try_for_each(|case| self.predicted(case, CHECK))
    }

    /// Checks the predictions of one request. A failure has the name `check`.
    fn predicted(&self, case: &Case, check: &'static str) -> CheckResult {
        let place = self.place(case);
        let fail = |place, seen: String, advice| Err(Failure::new(check, place, seen, advice));
        let predictions = match self.predict(case) {
            Ok(predictions) => predictions,
            Err(fault) => return fail(place, fault, FAULT),
        };
        let Description { name, tasks, .. } = self.description();
        for task in tasks {
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
                let seen = format!("prediction {} of expert `{name}`", values[row]);
                return fail(place.row(row), seen, NUMBER);
            }
        }
        Ok(())
    }

    /// Checks that requests with unknown ids, missing or extreme features or missing embeddings are
    /// answered like any other.
    ///
    /// # Errors
    /// The first request that is not.
    pub fn check_unknown_features(&self) -> CheckResult {
        for (name, change) in CHANGES {
            for mut case in self.cases() {
                change(&mut case);
                let named = |failure: Failure| Failure {
                    seen: format!("with {name}: {}", failure.seen),
                    ..failure
                };
                self.predicted(&case, UNKNOWN_CHECK).map_err(named)?;
                let limit = case.candidates();
                self.rank(&case, limit).map_err(|fault| {
                    let place = self.place(&case);
                    named(Failure::new(UNKNOWN_CHECK, place, fault, UNKNOWN_FAULT))
                })?;
            }
        }
        Ok(())
    }
}

/// Sets every id of candidates and history by its index. The surface stays, because a request
/// cannot have an unknown one.
fn ids(case: &mut Case, id: impl Fn(u64) -> u64) {
    const SURFACE: usize = 2;
    let example = &mut case.example;
    for (row, target) in example.targets.iter_mut().enumerate() {
        let columns = target.ids.iter_mut().enumerate().filter(|(column, _)| *column != SURFACE);
        columns.for_each(|(_, value)| *value = id(row as u64));
        Arc::make_mut(&mut target.item).id = id(row as u64);
    }
    for (at, event) in example.history.iter_mut().enumerate() {
        let item = Arc::make_mut(&mut event.item);
        item.id = id(at as u64);
        item.ids.iter_mut().for_each(|value| *value = id(at as u64));
    }
    Arc::make_mut(&mut example.user).id = id(0);
}

fn features(case: &mut Case, value: impl Fn(usize) -> f32) {
    for target in &mut case.example.targets {
        target.features.iter_mut().enumerate().for_each(|(at, feature)| *feature = value(at));
    }
}
