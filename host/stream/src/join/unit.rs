//! What a joiner holds: requests, or parts of them, with the impressions that
//! have come, and what their outcomes become with what is said of them.

use std::sync::Arc;

use hypercast_fm::example::{Example, MAX_VALUES, Outcome};
use serde::{Deserialize, Serialize};

use crate::ingest::Reaction;
use hypercast_core::hash::mix64;
use hypercast_data::dataset::{Context, Impression};
use hypercast_data::schema::Schema;

/// A unit by its sequence number, and one of its rows.
pub(super) type Place = (u64, u16);

/// A request, or a part of one, with the impressions that have come.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) request: u64,
    /// Which part of its request it is.
    pub(super) part: u32,
    /// Outcomes of its targets are what is known so far.
    pub(super) example: Example,
    pub(super) rows: Vec<Row>,
    /// The newest of its events.
    pub(super) ingested_ms: i64,
    /// The clock when it left.
    pub(super) left_ms: Option<i64>,
}

/// An impression besides what its target says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Row {
    pub(super) time_ms: i64,
    pub(super) context: Context,
    /// Whether nothing more is waited for.
    pub(super) done: bool,
}

impl Unit {
    pub(super) fn new(part: u32, mut example: Example, rows: Vec<Row>, ingested_ms: i64) -> Unit {
        let request = example.request;
        // Parts have ids of their own, as those of a replay have.
        if part > 0 {
            example.request = mix64(request ^ mix64(u64::from(part)));
        }
        Unit { request, part, example, rows, ingested_ms, left_ms: None }
    }

    pub(super) fn impression(&self, row: usize, outcome_ms: i64) -> Impression {
        let (target, Row { time_ms, context, .. }) = (&self.example.targets[row], &self.rows[row]);
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

/// Who an impression is.
pub(super) fn key(request: u64, item: u64) -> u64 {
    mix64(request ^ mix64(item.wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// By surface, the actions whose outcome is waited for: those that a task of the surface has for its label, and
/// those that are no task's label, of which nothing says that they do not belong there.
pub(super) fn awaited(schema: &Arc<Schema>) -> Vec<u32> {
    let labels = |task: usize| schema.action(&schema.tasks[task].label);
    let tasks = || 0..schema.tasks.len();
    let of = |surface: u16, action: usize| {
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

/// An outcome with what is said of it now.
pub(super) fn with(mut outcome: Outcome, said: &Reaction, awaited: u32) -> Outcome {
    let Outcome { actions, known, values } = said.outcome;
    outcome.actions = outcome.actions & !known | actions & known;
    outcome.known |= known;
    if said.complete {
        outcome.known |= awaited;
    }
    for (kept, said) in outcome.values.iter_mut().zip(values) {
        if said.is_finite() {
            *kept = said;
        }
    }
    outcome
}

/// What of an outcome is new or another: the rest is not known.
pub(super) fn difference(before: Outcome, after: Outcome) -> Outcome {
    let known = after.known & (!before.known | before.actions ^ after.actions);
    let mut values = [f32::NAN; MAX_VALUES];
    for (value, (before, after)) in values.iter_mut().zip(before.values.iter().zip(after.values)) {
        if after.is_finite() && after != *before {
            *value = after;
        }
    }
    Outcome { actions: after.actions & known, known, values }
}
