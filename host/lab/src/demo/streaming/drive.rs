//! The load: the data set's requests in time order at the chosen speed, each
//! ranked by the daemon, what was shown and what came of it told as it becomes known.
//!
//! An event is due when the data set says, divided by the speed-up. Where the machine cannot keep up the
//! replay falls behind and says so; it leaves nothing out. Some outcomes are told after their window, on purpose.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
    time::{Duration, Instant},
};

use super::{client::Client, operator::Course, scores::Scores};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::{
    Dataset, Impression,
    timeline::{Span, Step, Timeline},
};
use hypercast_serve::api::{ActionBody, EventBody, EventsRequest, ImpressionBody};

/// Requests that go out together at most.
const TOGETHER: usize = 32;

/// How long what is due may be gathered.
const GATHER: Duration = Duration::from_millis(100);

/// Of so many impressions with a positive outcome one is told late.
const LATE_ONE_IN: u64 = 25;

/// Events in one body.
const EVENTS: usize = 500;

/// The most round trips that are kept for quantiles.
const KEPT: usize = 1 << 20;

/// When the replay goes how fast.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// The first event.
    pub from_ms: i64,
    /// Event time over wall time.
    pub speed_up: f64,
    /// Requests in all.
    pub requests: u64,
    /// The end, however far it is then.
    pub most: Duration,
    /// After the end of the longest window.
    pub late_ms: i64,
}

/// What was sent and answered.
#[derive(Debug, Clone, Default)]
pub struct Sent {
    /// Requests for rankings.
    pub requests: u64,
    /// Of those, answered by an arm, by name.
    pub arms: BTreeMap<String, u64>,
    /// Of those, answered by the FM's own ranking.
    pub degraded: u64,
    /// Requests that were refused; their impressions were told all the same.
    pub refused: u64,
    /// Impressions.
    pub impressions: u64,
    /// Actions in time.
    pub actions: u64,
    /// Actions after their window.
    pub late: u64,
    /// Round trips of requests, milliseconds.
    pub took_ms: Vec<f64>,
    /// The time of the newest event.
    pub event_ms: i64,
    /// How far behind its schedule the replay is.
    pub behind: Duration,
}

/// A replay under way.
pub struct Drive<'a> {
    client: &'a Client,
    pace: Pace,
    /// What was sent so far.
    pub sent: Sent,
    /// How good what was served was.
    pub scores: Scores<'a>,
    group: Group,
    late: BinaryHeap<Reverse<Late>>,
    /// What is told late, by request and item.
    held: BTreeMap<(u64, u64), ActionBody>,
    /// Impressions that were shown before the stream began.
    older: BTreeSet<(u64, u64)>,
    started: Instant,
}

/// What goes out together: requests first, then what came of earlier ones.
#[derive(Default)]
struct Group {
    requests: Vec<Vec<Impression>>,
    outcomes: Vec<Impression>,
    /// A user's next request waits for what the user did before.
    users: BTreeSet<u64>,
    since: Option<Instant>,
}

/// An outcome that is told late.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Late {
    due_ms: i64,
    request: u64,
    item: u64,
}

impl<'a> Drive<'a> {
    /// Nothing is sent yet.
    pub fn new(client: &'a Client, scores: Scores<'a>, pace: Pace) -> Self {
        let sent = Sent { event_ms: pace.from_ms, ..Sent::default() };
        Self {
            client,
            pace,
            sent,
            scores,
            group: Group::default(),
            late: BinaryHeap::new(),
            held: BTreeMap::new(),
            older: BTreeSet::new(),
            started: Instant::now(),
        }
    }

    /// Replays to the end; `look` is called between groups, and may end it early with an error.
    ///
    /// # Errors
    /// A daemon that refuses events; those of `look`.
    pub fn run(
        &mut self,
        dataset: &Dataset,
        course: &Course,
        mut look: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let span = Span { from_ms: Some(self.pace.from_ms), until_ms: None };
        for step in Timeline::new(dataset, span)? {
            let step = step?;
            let time_ms = match &step {
                Step::Request(rows) => rows[0].time_ms,
                Step::Outcome(row) => row.outcome_ms,
            };
            if self.started.elapsed() >= self.pace.most {
                break;
            }
            self.keep_pace(time_ms, &mut look)?;
            // The operator's next decision comes before what is replayed after it.
            while course.is_ahead(self.share()) {
                self.flush()?;
                look(self)?;
                std::thread::sleep(GATHER);
            }
            self.sent.event_ms = time_ms;
            match step {
                Step::Outcome(row) if row.history_only => {}
                Step::Outcome(row) => {
                    self.group.users.insert(row.user);
                    self.group.outcomes.push(row);
                }
                Step::Request(rows) => {
                    let user = rows[0].user;
                    let full = self.group.requests.len() == TOGETHER;
                    if full || self.group.users.contains(&user) {
                        self.flush()?;
                        look(self)?;
                    }
                    self.group.users.insert(user);
                    self.group.requests.push(rows);
                }
            }
            self.group.since.get_or_insert_with(Instant::now);
            course.went_to(self.share());
        }
        self.flush()?;
        course.went_to(1.0);
        self.end()
    }

    /// How much of the replay is done.
    pub fn share(&self) -> f64 {
        let requests = self.sent.requests + self.group.requests.len() as u64;
        let of_data = requests as f64 / self.pace.requests.max(1) as f64;
        let of_time = self.started.elapsed().as_secs_f64() / self.pace.most.as_secs_f64();
        of_data.max(of_time).min(1.0)
    }

    /// Waits until an event is due; what is gathered goes out meanwhile.
    fn keep_pace(
        &mut self,
        time_ms: i64,
        look: &mut impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let after_ms = (time_ms - self.pace.from_ms).max(0) as f64 / self.pace.speed_up;
        let due = self.started + Duration::from_secs_f64(after_ms / 1e3);
        loop {
            let gathered = self.group.since.is_some_and(|since| since.elapsed() >= GATHER);
            if gathered {
                self.flush()?;
                look(self)?;
            }
            let now = Instant::now();
            self.sent.behind = now.saturating_duration_since(due);
            if now >= due || self.started.elapsed() >= self.pace.most {
                return Ok(());
            }
            std::thread::sleep((due - now).min(GATHER / 4));
        }
    }

    /// Sends what is gathered.
    fn flush(&mut self) -> Result<()> {
        let Group { requests, outcomes, .. } = std::mem::take(&mut self.group);
        if requests.is_empty() && outcomes.is_empty() {
            return Ok(());
        }
        let mut body = EventsRequest::default();
        for (rows, answered) in requests.iter().zip(self.client.rank(&requests)?) {
            self.sent.requests += 1;
            match answered.answer {
                Some(answer) => {
                    self.sent.degraded += u64::from(answer.degraded);
                    let arm = self.scores.served(&answer);
                    *self.sent.arms.entry(arm).or_default() += 1;
                }
                None => self.sent.refused += 1,
            }
            if self.sent.took_ms.len() < KEPT {
                self.sent.took_ms.push(answered.took.as_secs_f64() * 1e3);
            }
            body.impressions.extend(self.client.shown(rows));
        }
        self.sent.impressions += body.impressions.len() as u64;
        for row in outcomes {
            self.outcome(row, &mut body);
        }
        self.tell_late(self.sent.event_ms, &mut body);
        self.send(body, self.sent.event_ms)
    }

    /// What came of an impression: told now, or late.
    fn outcome(&mut self, row: Impression, body: &mut EventsRequest) {
        if row.time_ms < self.pace.from_ms {
            // It was shown before the stream began: nobody has told of it yet.
            let whole = self.client.whole(&row);
            if self.older.insert((whole.request, whole.item)) {
                self.sent.impressions += 1;
                body.events.push(whole);
            }
            return;
        }
        let action = self.client.action(&row);
        self.scores.outcome(action.request, &row);
        let hash = hypercast_core::hash::mix64(action.request ^ action.item.rotate_left(32));
        if row.outcome.actions != 0 && hash.is_multiple_of(LATE_ONE_IN) {
            let due_ms = action.time_ms + self.pace.late_ms;
            let (request, item) = (action.request, action.item);
            self.late.push(Reverse(Late { due_ms, request, item }));
            self.held.insert((request, item), ActionBody { time_ms: due_ms, ..action });
        } else {
            self.sent.actions += 1;
            body.actions.push(action);
        }
    }

    fn tell_late(&mut self, until_ms: i64, body: &mut EventsRequest) {
        while self.late.peek().is_some_and(|Reverse(late)| late.due_ms <= until_ms) {
            if let Some(Reverse(late)) = self.late.pop() {
                body.actions.extend(self.held.remove(&(late.request, late.item)));
                self.sent.late += 1;
            }
        }
    }

    /// Sends a body in parts: what was shown first, the clock last.
    fn send(&self, body: EventsRequest, clock_ms: i64) -> Result<()> {
        for part in body.events.chunks(EVENTS) {
            let events: Vec<EventBody> = part.to_vec();
            self.client.tell(&EventsRequest { events, ..EventsRequest::default() })?;
        }
        for part in body.impressions.chunks(EVENTS) {
            let impressions: Vec<ImpressionBody> = part.to_vec();
            self.client.tell(&EventsRequest { impressions, ..EventsRequest::default() })?;
        }
        for part in body.actions.chunks(EVENTS) {
            let actions: Vec<ActionBody> = part.to_vec();
            self.client.tell(&EventsRequest { actions, ..EventsRequest::default() })?;
        }
        self.client.tell(&EventsRequest { clock_ms: Some(clock_ms), ..EventsRequest::default() })
    }

    /// What is late is told, and every window closes.
    fn end(&mut self) -> Result<()> {
        let close_ms = self.sent.event_ms + self.pace.late_ms;
        self.send(EventsRequest::default(), close_ms)?;
        let mut body = EventsRequest::default();
        self.tell_late(i64::MAX, &mut body);
        self.send(body, close_ms)
    }
}

/// The requests of a data set from a time on.
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
    match count {
        0 => Err(Error::invalid("the data set has no request from where the stream begins")),
        count => Ok((count, until_ms)),
    }
}
