//! Replays: a data set's requests as examples, each with what was known at its time. Training,
//! materialising and evaluation read these.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hypercast_core::hash::mix64;
use hypercast_fm::example::Example;

use super::{CandidateInput, FeatureConfig, FeatureState, RequestInput};
use crate::dataset::timeline::{Span, Timeline, TimelineStep};
use crate::dataset::{Dataset, Impression};
use crate::error::Result;

/// The requests to replay, and the size of their examples.
#[derive(Debug, Clone, Copy)]
pub struct ReplayOptions {
    /// The requests' time. Everything that was known before it is applied first.
    pub span: Span,
    /// The most events in an example's history.
    pub history_len: usize,
    /// The most targets of an example; a larger request becomes several examples.
    pub max_targets: usize,
    /// Bounds of the feature state.
    pub features: FeatureConfig,
}

/// Yields the requests of a span in time order as examples with their outcomes.
pub struct Replay {
    timeline: Timeline,
    state: FeatureState,
    ready: VecDeque<Example>,
    options: ReplayOptions,
    /// Examples that are still to be left out.
    skip: u64,
}

impl Replay {
    /// Builds a state as of the span's start and replays from there.
    pub fn new(dataset: &Dataset, options: ReplayOptions) -> Result<Replay> {
        let state = match options.span.from_ms {
            Some(from_ms) => FeatureState::rebuild(dataset, options.features, Some(from_ms))?,
            None => FeatureState::new(dataset, options.features),
        };
        let timeline = Timeline::new(dataset, options.span)?;
        Ok(Replay { timeline, state, ready: VecDeque::new(), options, skip: 0 })
    }

    /// Leaves out the next `examples`, as a resumed run needs that has learned from them. Their
    /// outcomes are still applied.
    pub fn skipping(self, examples: u64) -> Replay {
        Replay { skip: examples, ..self }
    }

    fn fetch(&mut self, rows: &[Impression]) {
        for (part, rows) in rows.chunks(self.options.max_targets.max(1)).enumerate() {
            if self.skip > 0 {
                self.skip -= 1;
                continue;
            }
            let mut request = request_input(rows);
            // The first part of a request keeps its id; the others get ids of their own.
            if part > 0 {
                request.request = mix64(request.request ^ mix64(part as u64));
            }
            self.ready.push_back(self.state.fetch(&request, self.options.history_len));
        }
    }
}

impl Iterator for Replay {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.ready.is_empty() {
            match self.timeline.next()? {
                Err(error) => return Some(Err(error)),
                Ok(TimelineStep::Outcome(impression)) => self.state.apply(&impression),
                Ok(TimelineStep::Request(rows)) => self.fetch(&rows),
            }
        }
        self.ready.pop_front().map(Ok)
    }
}

/// The request that some impressions answered, with their outcomes.
///
/// # Panics
/// Without impressions.
pub fn request_input(rows: &[Impression]) -> RequestInput {
    let first = rows.first().expect("a request has candidates");
    let candidate = |row: &Impression| CandidateInput {
        item: row.item,
        features: None,
        context: Arc::new(row.context.clone()),
        outcome: row.outcome,
        truth: row.truth.clone(),
    };
    RequestInput {
        request: first.request,
        user: first.user,
        user_features: None,
        surface: first.surface,
        time_ms: first.time_ms,
        candidates: rows.iter().map(candidate).collect(),
    }
}

/// The number of consecutive history-only events that make one pre-training request.
pub const PRETRAINING_CHUNK: usize = 8;

/// How history-only events become examples.
#[derive(Debug, Clone, Copy)]
pub struct PretrainingOptions {
    /// Events from here on are left out; `None` takes all.
    pub until_ms: Option<i64>,
    /// The most events in an example's history.
    pub history_len: usize,
    /// The number of consecutive events of a user that are an example's targets.
    pub chunk: usize,
    /// Passes over all events, each with new counters.
    pub passes: usize,
    /// Seed of the order of users.
    pub seed: u64,
    /// Bounds of the feature state.
    pub features: FeatureConfig,
}

/// Yields examples made of history-only events: chunk k of every user, then chunk k + 1 of every
/// user. The order is roughly that of time, although the events' exact times are not known.
///
/// An example's targets are the chunk, and its history is what the same user did before. Counters
/// start empty and follow this order; the state is discarded afterwards.
pub struct Pretraining {
    state: FeatureState,
    options: PretrainingOptions,
    users: Vec<Vec<Impression>>,
    /// The number of the chunk and the index of the user for each example of a pass.
    order: Vec<(usize, usize)>,
    /// The number of examples so far, in all passes.
    next: usize,
}

impl Pretraining {
    /// Reads the history-only events of a data set.
    pub fn new(dataset: &Dataset, options: PretrainingOptions) -> Result<Pretraining> {
        let options = PretrainingOptions { chunk: options.chunk.max(1), ..options };
        let mut by_user: BTreeMap<u64, Vec<Impression>> = BTreeMap::new();
        for impression in dataset.impressions()? {
            let impression = impression?;
            if impression.history_only
                && options.until_ms.is_none_or(|until_ms| impression.outcome_ms < until_ms)
            {
                by_user.entry(impression.user).or_default().push(impression);
            }
        }
        let mut users: Vec<(u64, Vec<Impression>)> = by_user.into_iter().collect();
        users.sort_by_key(|(user, _)| mix64(options.seed ^ mix64(*user)));
        let users: Vec<Vec<Impression>> = users.into_iter().map(|(_, events)| events).collect();
        let chunks = |(user, events): (usize, &Vec<Impression>)| {
            (0..events.len().div_ceil(options.chunk)).map(move |chunk| (chunk, user))
        };
        let mut order: Vec<(usize, usize)> = users.iter().enumerate().flat_map(chunks).collect();
        order.sort_unstable();
        let state = FeatureState::new(dataset, options.features);
        Ok(Pretraining { state, options, users, order, next: 0 })
    }

    /// The number of examples in all passes.
    pub fn examples(&self) -> usize {
        self.order.len() * self.options.passes
    }
}

impl Iterator for Pretraining {
    type Item = Example;

    fn next(&mut self) -> Option<Example> {
        if self.next == self.examples() {
            return None;
        }
        let at = self.next % self.order.len();
        self.next += 1;
        if at == 0 {
            self.state.forget_events();
        }
        let (chunk, user) = self.order[at];
        let rows = self.users[user].chunks(self.options.chunk).nth(chunk)?;
        let example = self.state.fetch(&request_input(rows), self.options.history_len);
        rows.iter().for_each(|row| self.state.apply(row));
        Some(example)
    }
}
