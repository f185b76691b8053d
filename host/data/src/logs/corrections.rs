//! Late outcomes, put into the rows that they belong to: whoever reads logs of the
//! past in passes sees what is known by now, once.
//!
//! A follower does not do this: it has learned from the row, and learns from the correction.

use std::collections::HashMap;

use hypercast_fm::example::Outcome;

use super::Logged;

/// What changed, by request and place among its corrected targets' items.
#[derive(Debug, Default)]
pub(super) struct Corrections {
    by_request: HashMap<u64, Vec<(u64, Outcome)>>,
}

impl Corrections {
    /// Remembers a correction; a later one of the same item is applied after it.
    pub(super) fn add(&mut self, correction: &Logged) {
        let targets = correction.example.targets.iter();
        self.by_request
            .entry(correction.example.request)
            .or_default()
            .extend(targets.map(|target| (target.item.id, target.outcome)));
    }

    /// Corrects a row.
    pub(super) fn apply(&self, logged: &mut Logged) {
        let Some(changes) = self.by_request.get(&logged.example.request) else { return };
        for (item, change) in changes {
            for target in logged.example.targets.iter_mut().filter(|own| own.item.id == *item) {
                target.outcome = corrected(target.outcome, *change);
            }
        }
    }
}

/// An outcome with what a correction knows in the place of what was known.
fn corrected(outcome: Outcome, change: Outcome) -> Outcome {
    let mut values = outcome.values;
    for (value, change) in values.iter_mut().zip(change.values) {
        if !change.is_nan() {
            *value = change;
        }
    }
    Outcome {
        actions: outcome.actions & !change.known | change.actions & change.known,
        known: outcome.known | change.known,
        values,
    }
}
