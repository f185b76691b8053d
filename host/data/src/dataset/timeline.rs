//! The data set as it happened: requests and outcomes in time order.
//!
//! This is the only place that decides what was known when. Whoever follows
//! it, a trainer or a client that replays requests through a daemon, sees an
//! outcome only before the requests that came strictly after it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::{Dataset, Impression, ImpressionReader};
use crate::error::Result;

/// What happens next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// A request: the impressions that answered it, at least one, with what came of them.
    Request(Vec<Impression>),
    /// An outcome became known.
    Outcome(Impression),
}

/// The stretch of time that a timeline covers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Span {
    /// Requests before it are left out, as are outcomes known before it; `None` begins at the beginning.
    pub from_ms: Option<i64>,
    /// Nothing from here on; `None` goes on to the end.
    pub until_ms: Option<i64>,
}

/// Walks a data set in time order. A span's end loses nothing: a timeline that begins where another
/// ended yields the outcomes that were still open.
pub struct Timeline {
    impressions: std::iter::Peekable<ImpressionReader>,
    span: Span,
    open: BinaryHeap<Reverse<Open>>,
    sequence: u64,
}

impl Timeline {
    /// Starts at the beginning of `span`.
    pub fn new(dataset: &Dataset, span: Span) -> Result<Timeline> {
        let impressions = dataset.impressions()?.peekable();
        Ok(Timeline { impressions, span, open: BinaryHeap::new(), sequence: 0 })
    }

    fn wait_for_outcome(&mut self, impression: Impression) {
        if self.span.from_ms.is_none_or(|from_ms| impression.outcome_ms >= from_ms) {
            self.open.push(Reverse(Open { sequence: self.sequence, impression }));
            self.sequence += 1;
        }
    }

    fn next_step(&mut self) -> Result<Option<Step>> {
        loop {
            let next = match self.impressions.peek() {
                None => None,
                Some(Ok(impression)) => Some((impression.time_ms, impression.request)),
                Some(Err(_)) => {
                    return Err(self.impressions.next().expect("peeked").expect_err("peeked"));
                }
            };
            let due = self.open.peek().map(|Reverse(open)| open.impression.outcome_ms);
            if let Some(due_ms) =
                due.filter(|&due_ms| next.is_none_or(|(time_ms, _)| due_ms < time_ms))
            {
                if self.span.until_ms.is_some_and(|until_ms| due_ms >= until_ms) {
                    return Ok(None);
                }
                return Ok(self.open.pop().map(|Reverse(open)| Step::Outcome(open.impression)));
            }
            let Some((time_ms, request)) = next.filter(|&(time_ms, _)| {
                self.span.until_ms.is_none_or(|until_ms| time_ms < until_ms)
            }) else {
                return self.drain();
            };
            let rows = self.take_request(time_ms, request)?;
            let before = self.span.from_ms.is_some_and(|from_ms| time_ms < from_ms);
            rows.iter().for_each(|row| self.wait_for_outcome(row.clone()));
            if !before && !rows[0].history_only {
                return Ok(Some(Step::Request(rows)));
            }
        }
    }

    /// No request is left in the span: the outcomes that fall into it are.
    fn drain(&mut self) -> Result<Option<Step>> {
        let until_ms = self.span.until_ms;
        let open = self.open.pop().map(|Reverse(open)| open.impression);
        Ok(open
            .filter(|impression| until_ms.is_none_or(|ms| impression.outcome_ms < ms))
            .map(Step::Outcome))
    }

    fn take_request(&mut self, time_ms: i64, request: u64) -> Result<Vec<Impression>> {
        let mut rows: Vec<Impression> = Vec::new();
        while let Some(Ok(row)) = self.impressions.peek() {
            if (row.time_ms, row.request) != (time_ms, request)
                || rows.first().is_some_and(|first| first.history_only != row.history_only)
            {
                break;
            }
            rows.push(self.impressions.next().expect("peeked")?);
        }
        Ok(rows)
    }
}

impl Iterator for Timeline {
    type Item = Result<Step>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_step().transpose()
    }
}

/// An impression whose outcome is not known yet; the earliest outcome first, equal ones as they were shown.
struct Open {
    sequence: u64,
    impression: Impression,
}

impl Open {
    fn key(&self) -> (i64, u64) {
        (self.impression.outcome_ms, self.sequence)
    }
}

impl PartialEq for Open {
    fn eq(&self, other: &Open) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Open {}

impl PartialOrd for Open {
    fn partial_cmp(&self, other: &Open) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Open {
    fn cmp(&self, other: &Open) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}
