//! Pending requests: the impressions of a request that have come so far, and how actions change
//! their outcomes.

use std::sync::Arc;

use hypercast_core::hash::mix64;
use hypercast_data::dataset::{ContextFeatures, Impression};
use hypercast_data::ranked_place::RankedPlace;
use hypercast_data::schema::{Schema, growth::EntryKind};
use hypercast_fm::example::{Example, Outcome};
use serde::{Deserialize, Serialize};

use crate::events::ActionEvent;

/// One impression of a pending request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ImpressionSlot {
    /// The sequence number of the pending request.
    pub(super) request: u64,
    /// The impression's index within it.
    pub(super) row: u16,
}

/// A request, or a part of one, with the impressions that have come. It stays here after its
/// example was written, as long as it can be corrected.
#[derive(Debug)]
pub(super) struct PendingRequest {
    pub(super) request: u64,
    /// The number of this part within its request.
    pub(super) part: u32,
    /// The outcomes of its targets are what is known so far.
    pub(super) example: Example,
    pub(super) rows: Vec<PendingImpression>,
    /// When the newest of its events was received.
    pub(super) ingested_ms: i64,
    /// The joiner's clock when its example was written.
    pub(super) joined_ms: Option<i64>,
}

/// What an impression has besides its target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PendingImpression {
    pub(super) time_ms: i64,
    pub(super) context: ContextFeatures,
    /// Whether the impression waits for nothing more.
    pub(super) done: bool,
    /// Where a daemon ranked the item, if that is known. It is saved by itself, because states of
    /// earlier releases lack it.
    #[serde(skip)]
    pub(super) ranked: Option<RankedPlace>,
}

impl PendingRequest {
    pub(super) fn new(
        part: u32,
        mut example: Example,
        rows: Vec<PendingImpression>,
        ingested_ms: i64,
    ) -> PendingRequest {
        let request = example.request;
        // Each part has an id of its own, as in a replay.
        if part > 0 {
            example.request = mix64(request ^ mix64(u64::from(part)));
        }
        PendingRequest { request, part, example, rows, ingested_ms, joined_ms: None }
    }

    /// Whether no impression waits for an outcome.
    pub(super) fn is_complete(&self) -> bool {
        self.rows.iter().all(|row| row.done)
    }

    /// Whether it is known of some item where it was ranked.
    pub(super) fn is_ranked(&self) -> bool {
        self.rows.iter().any(|row| row.ranked.is_some())
    }

    pub(super) fn impression(&self, row: usize, outcome_ms: i64) -> Impression {
        let (target, PendingImpression { time_ms, context, .. }) =
            (&self.example.targets[row], &self.rows[row]);
        Impression {
            request: self.request,
            time_ms: *time_ms,
            outcome_ms,
            user: self.example.user.id,
            item: target.item.id,
            surface: self.example.surface,
            outcome: target.outcome,
            context: context.clone(),
            truth: Vec::new(),
            history_only: false,
        }
    }
}

/// The key of an impression.
pub(super) fn impression_key(request: u64, item: u64) -> u64 {
    mix64(request ^ mix64(item.wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// For each surface, the actions (one bit each) that its impressions wait for: the labels of the
/// surface's tasks, and the actions that are no task's label, because nothing excludes them from
/// the surface. Nobody waits for what belongs to another surface.
pub(super) fn awaited_actions(schema: &Arc<Schema>) -> Vec<u64> {
    let labels = |task: usize| schema.action(&schema.tasks[task].label);
    let tasks = || 0..schema.tasks.len();
    let of = |surface: u16, action: usize| {
        let name = schema.surfaces[usize::from(surface)].as_str();
        if !schema.is_seen_on(Some(name), EntryKind::Action, &schema.actions[action]) {
            return false;
        }
        let mut labelled = tasks().filter(|&task| labels(task) == Some(action)).peekable();
        labelled.peek().is_none() || labelled.any(|task| schema.task_valid(task, surface))
    };
    let bits = |surface| {
        (0..schema.actions.len())
            .filter(|&action| of(surface, action))
            .fold(0, |bits, action| bits | 1 << action)
    };
    (0..schema.surfaces.len() as u16).map(bits).collect()
}

/// The actions, one bit each, that belong to no surface.
pub(super) fn core_actions(schema: &Schema) -> u64 {
    let actions = schema.actions.iter().enumerate();
    let of_core = actions.filter(|(_, name)| schema.owner(EntryKind::Action, name).is_none());
    of_core.fold(0, |bits, (action, _)| bits | 1 << action)
}

/// An outcome after an action. `awaited` are the actions that become known if the outcome is
/// complete.
pub(super) fn merged(mut outcome: Outcome, action: &ActionEvent, awaited: u64) -> Outcome {
    let Outcome { actions, known, values } = action.outcome;
    outcome.actions = outcome.actions & !known | actions & known;
    outcome.known |= known;
    if action.complete {
        outcome.known |= awaited;
    }
    for (old, new) in outcome.values.iter_mut().zip(values) {
        if new.is_finite() {
            *old = new;
        }
    }
    outcome
}

/// What is learned of an outcome once its example was written: actions that came to have happened,
/// and values that became known. What is taken back later would be learned from again each time,
/// so one user could outweigh thousands.
pub(super) fn without_reversals(before: Outcome, after: Outcome) -> Outcome {
    let value = |at: usize| {
        let (was, is) = (before.values[at], after.values[at]);
        if was.is_finite() { was } else { is }
    };
    Outcome {
        actions: before.actions | after.actions,
        known: after.known,
        values: std::array::from_fn(value),
    }
}

/// What changed in an outcome; the rest is unknown.
pub(super) fn difference(before: Outcome, after: Outcome) -> Outcome {
    let known = after.known & (!before.known | before.actions ^ after.actions);
    let values = std::array::from_fn(|at| {
        let (was, is) = (before.values[at], after.values[at]);
        if is.is_finite() && is != was { is } else { f32::NAN }
    });
    Outcome { actions: after.actions & known, known, values }
}

#[cfg(test)]
mod tests {
    use hypercast_data::schema::OwnedEntries;

    use super::*;

    #[test]
    fn nobody_waits_for_an_action_of_another_surface() {
        let mut schema = hypercast_data::simulate::schema(2);
        let awaited = |schema: &Schema| awaited_actions(&Arc::new(schema.clone()));
        assert_eq!(awaited(&schema), [0b111, 0b011]);
        schema.actions.push("cart".into());
        assert_eq!(awaited(&schema), [0b1111, 0b1011]);
        let actions = ["cart".to_owned()].into();
        let own = OwnedEntries { actions, ..OwnedEntries::default() };
        schema.owned.insert(schema.surfaces[1].clone(), own);
        assert_eq!(awaited(&schema), [0b0111, 0b1011]);
        assert_eq!(core_actions(&schema), 0b0111);
    }
}
