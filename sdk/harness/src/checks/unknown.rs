//! What no training saw: ids that are new, features that are missing or far out,
//! users without history, a foundation model that is away.

use std::sync::Arc;

use super::Checked;
use crate::cases::Case;
use crate::error::Failure;
use crate::harness::Harness;

const CHECK: &str = "unknown features";
const FAULT: &str = "tomorrow's requests have new items and missing features: look up by id with a default, never by index";

/// A change of a request.
type Change = fn(&mut Case);

/// What is changed of a request, by name.
const CHANGES: [(&str, Change); 6] = [
    ("ids never seen", |case| ids(case, |at| u64::MAX / 2 - at)),
    ("the largest ids", |case| ids(case, |_| i64::MAX as u64)),
    ("ids missing", |case| ids(case, |_| 0)),
    ("features missing", |case| features(case, |_| 0.0)),
    ("features far out", |case| features(case, |at| if at % 2 == 0 { 1e9 } else { -1e9 })),
    ("no embedding", |case| case.tae.fill(0.0)),
];

impl Harness {
    /// Requests with unknown ids, missing or extreme features and missing embeddings are answered like any other.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check_unknown_features(&self) -> Checked {
        for (name, change) in CHANGES {
            for mut case in self.cases() {
                change(&mut case);
                let named = |failure: Failure| Failure {
                    seen: format!("with {name}: {}", failure.seen),
                    ..failure
                };
                self.predicted(&case, CHECK).map_err(named)?;
                let limit = case.candidates();
                self.rank(&case, limit).map_err(|fault| {
                    let place = self.place(&case);
                    named(Failure { check: CHECK, place, seen: fault, advice: FAULT })
                })?;
            }
        }
        Ok(())
    }
}

/// Gives every id of candidates and history a value by its place. The surface stays: the host knows all of them.
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
