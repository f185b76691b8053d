//! The load: the data set's requests in time order at the chosen speed. Each is ranked by the
//! daemon; its impressions and their outcomes are sent as they become known.
//!
//! An event is due at its time in the data set, divided by the speed-up. Where the machine cannot
//! keep up the replay falls behind and reports it, but leaves nothing out. Some outcomes are sent
//! after their window on purpose.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use hypercast_data::dataset::{
    Dataset, Impression,
    timeline::{Span, Timeline, TimelineStep},
};
use hypercast_serve::api::{ActionBody, EventsRequest};

use serde::Serialize;

use super::{operator::ReplayProgress, scores::ServedScores};
use crate::{
    demo::{client::DemoClient, replay::PendingBatch},
    error::{CommonErrors as _, Error, Result},
};

/// How long due events may be gathered.
const GATHER: Duration = Duration::from_millis(100);

/// One in so many impressions with a positive outcome is sent late.
const LATE_ONE_IN: u64 = 25;

/// Round trips that are kept for quantiles at most.
const MAX_ROUND_TRIPS: usize = 1 << 20;

/// Speed and limits of a replay.
#[derive(Debug, Clone, Copy)]
pub struct ReplaySchedule {
    /// Time of the first event, milliseconds since the epoch.
    pub from_ms: i64,
    /// Event time over wall time.
    pub speed_up: f64,
    /// Requests in all.
    pub requests: u64,
    /// The replay ends after this time, however far it is.
    pub max_duration: Duration,
    /// How long after an impression a late outcome is sent: after the longest window.
    pub late_ms: i64,
}

/// Counts of what was sent and answered.
#[derive(Debug, Clone, Default, Serialize)]
pub struct ReplayCounts {
    /// Requests for rankings.
    pub requests: u64,
    /// Requests by the arm that answered.
    pub arms: BTreeMap<String, u64>,
    /// Requests answered by the FM's own ranking.
    pub degraded: u64,
    /// Requests that were refused; their impressions were sent all the same.
    pub refused: u64,
    /// Impressions sent.
    pub impressions: u64,
    /// Actions sent within their windows.
    pub actions: u64,
    /// Actions sent after their windows.
    pub late_actions: u64,
    /// Round trips of requests.
    #[serde(skip)]
    pub round_trips_ms: Vec<f64>,
    /// The time of the newest event.
    #[serde(skip)]
    pub event_ms: i64,
    /// How far behind its schedule the replay is.
    #[serde(skip)]
    pub behind: Duration,
}

/// A replay under way.
pub struct LoadGenerator<'a> {
    client: &'a DemoClient,
    schedule: ReplaySchedule,
    /// What was sent so far.
    pub sent: ReplayCounts,
    /// Quality of the served predictions.
    pub scores: ServedScores,
    pending: PendingBatch,
    /// The actions that are sent late.
    late: BTreeMap<LateOutcome, ActionBody>,
    /// Impressions that were shown before the stream began.
    older: BTreeSet<(u64, u64)>,
    started: Instant,
}

/// An outcome that is sent late.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct LateOutcome {
    due_ms: i64,
    request: u64,
    item: u64,
}

impl<'a> LoadGenerator<'a> {
    /// A replay that has not begun.
    pub fn new(client: &'a DemoClient, scores: ServedScores, schedule: ReplaySchedule) -> Self {
        let sent = ReplayCounts { event_ms: schedule.from_ms, ..ReplayCounts::default() };
        Self {
            client,
            schedule,
            sent,
            scores,
            pending: PendingBatch::default(),
            late: BTreeMap::new(),
            older: BTreeSet::new(),
            started: Instant::now(),
        }
    }

    /// Replays to the end. `look` is called between batches, and may end the replay with an error.
    ///
    /// # Errors
    /// A daemon that rejects events; those of `look`.
    pub fn run(
        &mut self,
        dataset: &Dataset,
        progress: &ReplayProgress,
        mut look: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let span = Span { from_ms: Some(self.schedule.from_ms), until_ms: None };
        for step in Timeline::new(dataset, span)? {
            let step = step?;
            let time_ms = match &step {
                TimelineStep::Request(rows) => rows[0].time_ms,
                TimelineStep::Outcome(row) => row.outcome_ms,
            };
            if self.started.elapsed() >= self.schedule.max_duration {
                break;
            }
            self.keep_pace(time_ms, &mut look)?;
            // The operator's next decision comes before what is replayed after it.
            while progress.is_ahead(self.share()) {
                self.flush()?;
                look(self)?;
                std::thread::sleep(GATHER);
            }
            self.sent.event_ms = time_ms;
            if self.pending.goes_before(&step) {
                self.flush()?;
                look(self)?;
            }
            if !matches!(&step, TimelineStep::Outcome(row) if row.history_only) {
                self.pending.push(step);
            }
            progress.advance_to(self.share());
        }
        self.flush()?;
        progress.advance_to(1.0);
        self.end()
    }

    /// The share of the replay that is done.
    pub fn share(&self) -> f64 {
        let requests = self.sent.requests + self.pending.requests.len() as u64;
        let of_data = requests as f64 / self.schedule.requests.max(1) as f64;
        let of_time =
            self.started.elapsed().as_secs_f64() / self.schedule.max_duration.as_secs_f64();
        of_data.max(of_time).min(1.0)
    }

    /// Waits until an event is due; gathered events go out meanwhile.
    fn keep_pace(
        &mut self,
        time_ms: i64,
        look: &mut impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let after_ms = (time_ms - self.schedule.from_ms).max(0) as f64 / self.schedule.speed_up;
        let due = self.started + Duration::from_secs_f64(after_ms / 1e3);
        loop {
            let gathered = self.pending.since.is_some_and(|since| since.elapsed() >= GATHER);
            if gathered {
                self.flush()?;
                look(self)?;
            }
            let now = Instant::now();
            self.sent.behind = now.saturating_duration_since(due);
            if now >= due || self.started.elapsed() >= self.schedule.max_duration {
                return Ok(());
            }
            std::thread::sleep((due - now).min(GATHER / 4));
        }
    }

    /// Sends the gathered events.
    fn flush(&mut self) -> Result<()> {
        let PendingBatch { requests, outcomes, .. } = std::mem::take(&mut self.pending);
        if requests.is_empty() && outcomes.is_empty() {
            return Ok(());
        }
        let bodies: Vec<_> = requests.iter().map(|rows| self.client.live_request(rows)).collect();
        let mut body = EventsRequest::default();
        for (rows, answered) in requests.iter().zip(self.client.rank_all(&bodies)?) {
            self.sent.requests += 1;
            match answered.answer {
                Some(answer) => {
                    self.sent.degraded += u64::from(answer.degraded);
                    let arm = self.scores.serve(&answer);
                    *self.sent.arms.entry(arm).or_default() += 1;
                }
                None => self.sent.refused += 1,
            }
            if self.sent.round_trips_ms.len() < MAX_ROUND_TRIPS {
                self.sent.round_trips_ms.push(answered.took.as_secs_f64() * 1e3);
            }
            body.impressions.extend(self.client.impressions(rows));
        }
        self.sent.impressions += body.impressions.len() as u64;
        for row in outcomes {
            self.outcome(row, &mut body);
        }
        body.clock_ms = Some(self.sent.event_ms);
        self.add_late(self.sent.event_ms, &mut body);
        self.client.send(body)
    }

    /// The outcome of an impression: sent now, or late.
    fn outcome(&mut self, row: Impression, body: &mut EventsRequest) {
        if row.time_ms < self.schedule.from_ms {
            // It was shown before the stream began, so its impression was not sent yet.
            let whole = self.client.event(&row);
            if self.older.insert((whole.request, whole.item.key())) {
                self.sent.impressions += 1;
                body.events.push(whole);
            }
            return;
        }
        let action = self.client.action(&row);
        self.scores.score(action.request, &row);
        let hash = hypercast_core::hash::mix64(action.request ^ action.item.key().rotate_left(32));
        if row.outcome.actions != 0 && hash.is_multiple_of(LATE_ONE_IN) {
            let due_ms = action.time_ms + self.schedule.late_ms;
            let (request, item) = (action.request, action.item.key());
            let late = ActionBody { time_ms: due_ms, ..action };
            self.late.insert(LateOutcome { due_ms, request, item }, late);
        } else {
            self.sent.actions += 1;
            body.actions.push(action);
        }
    }

    fn add_late(&mut self, until_ms: i64, body: &mut EventsRequest) {
        while let Some(late) = self.late.first_entry().filter(|late| late.key().due_ms <= until_ms)
        {
            body.actions.push(late.remove());
            self.sent.late_actions += 1;
        }
    }

    /// Sends the late outcomes, after every window has closed.
    fn end(&mut self) -> Result<()> {
        let clock_ms = Some(self.sent.event_ms + self.schedule.late_ms);
        let mut body = EventsRequest { clock_ms, ..EventsRequest::default() };
        self.client.send(body.clone())?;
        self.add_late(i64::MAX, &mut body);
        self.client.send(body)
    }
}

/// The number of requests of a data set from a time on, and the time of the last.
///
/// # Errors
/// A data set that has none, or cannot be read.
pub fn count(dataset: &Dataset, from_ms: i64) -> Result<(u64, i64)> {
    let (mut count, mut last, mut until_ms) = (0, None, from_ms);
    for impression in dataset.impressions()? {
        let impression = impression?;
        if impression.time_ms < from_ms || impression.history_only {
            continue;
        }
        until_ms = until_ms.max(impression.time_ms);
        if last.replace(impression.request) != Some(impression.request) {
            count += 1;
        }
    }
    if count == 0 {
        return Err(Error::invalid("the data set has no request from where the stream begins"));
    }
    Ok((count, until_ms))
}
