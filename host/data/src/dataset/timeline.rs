//! The data set in time order: requests, and outcomes when they became known.
//!
//! Only this module decides what was known when. A trainer, or a client that replays requests
//! through a daemon, sees an outcome only before the requests that came strictly after it.

use std::collections::BTreeMap;

use super::{Dataset, Impression, ImpressionReader};
use crate::error::Result;

/// The next event of a timeline.
#[derive(Debug, Clone, PartialEq)]
pub enum TimelineStep {
    /// A request: the impressions that answered it, at least one, with their later outcomes.
    Request(Vec<Impression>),
    /// The outcome of an impression became known.
    Outcome(Impression),
}

/// The stretch of time that a timeline covers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    /// Earlier requests, and outcomes known earlier, are left out; `None` starts at the first.
    pub from_ms: Option<i64>,
    /// Events from here on are left out; `None` goes on to the end.
    pub until_ms: Option<i64>,
}

impl Span {
    fn has_started(&self, time_ms: i64) -> bool {
        self.from_ms.is_none_or(|from_ms| time_ms >= from_ms)
    }

    fn has_ended(&self, time_ms: i64) -> bool {
        self.until_ms.is_some_and(|until_ms| time_ms >= until_ms)
    }
}

/// Walks a data set in time order. The end of a span loses nothing: a timeline that starts where
/// another ended yields the outcomes that were still pending.
pub struct Timeline {
    impressions: std::iter::Peekable<ImpressionReader>,
    span: Span,
    /// Impressions whose outcomes are not known yet, by the time when they will be and, among equal
    /// times, in the order shown.
    pending: BTreeMap<(i64, u64), Impression>,
    sequence: u64,
}

impl Timeline {
    /// Starts at the beginning of `span`.
    pub fn new(dataset: &Dataset, span: Span) -> Result<Timeline> {
        let impressions = dataset.impressions()?.peekable();
        Ok(Timeline { impressions, span, pending: BTreeMap::new(), sequence: 0 })
    }

    fn next_step(&mut self) -> Result<Option<TimelineStep>> {
        loop {
            let next = match self.impressions.peek() {
                None => None,
                Some(Ok(impression)) => Some((impression.time_ms, impression.request)),
                Some(Err(_)) => {
                    return Err(self.impressions.next().expect("peeked").expect_err("peeked"));
                }
            };
            let next = next.filter(|&(time_ms, _)| !self.span.has_ended(time_ms));
            if let Some(pending) = self.pending.first_entry() {
                let due_ms = pending.key().0;
                if next.is_none_or(|(time_ms, _)| due_ms < time_ms) {
                    let ended = self.span.has_ended(due_ms);
                    return Ok((!ended).then(|| TimelineStep::Outcome(pending.remove())));
                }
            }
            let Some((time_ms, request)) = next else { return Ok(None) };
            let rows = self.next_request(time_ms, request)?;
            for row in rows.iter().filter(|row| self.span.has_started(row.outcome_ms)) {
                self.pending.insert((row.outcome_ms, self.sequence), row.clone());
                self.sequence += 1;
            }
            if self.span.has_started(time_ms) && !rows[0].history_only {
                return Ok(Some(TimelineStep::Request(rows)));
            }
        }
    }

    /// Reads the impressions of a request.
    fn next_request(&mut self, time_ms: i64, request: u64) -> Result<Vec<Impression>> {
        let mut rows: Vec<Impression> = Vec::new();
        while let Some(row) = self.impressions.next_if(|row| {
            row.as_ref().is_ok_and(|row| {
                (row.time_ms, row.request) == (time_ms, request)
                    && rows.first().is_none_or(|first| first.history_only == row.history_only)
            })
        }) {
            rows.push(row?);
        }
        Ok(rows)
    }
}

impl Iterator for Timeline {
    type Item = Result<TimelineStep>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_step().transpose()
    }
}
