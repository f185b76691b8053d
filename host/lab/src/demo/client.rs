//! The demo as a client of the daemon: rankings, events, and the numbers of the live page.
//!
//! Events are sent again until they are accepted, which is safe because the daemon ignores repeated
//! events. A request for a ranking that is refused for lack of time is not repeated.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_data::{
    dataset::{Dataset, Impression, ids::IdTexts},
    schema::Schema,
};
use hypercast_serve::{
    api::{
        ActionBody, EventBody, EventsAnswer, EventsRequest, ImpressionBody, RankAnswer,
        RankCandidate, RankRequest,
    },
    convert::Converter,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{CommonErrors as _, Error, Result};

const THREADS: usize = 2;

/// Events in one body.
const EVENTS_PER_BODY: usize = 500;

/// How often events are sent again, and the time between.
const ATTEMPTS: u32 = 100;
const RETRY_AFTER: Duration = Duration::from_millis(100);

/// The time that the daemon has for an answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A client of one daemon.
pub struct DemoClient {
    url: String,
    agent: ureq::Agent,
    schema: Arc<Schema>,
    converter: Converter,
    ids: IdTexts,
}

/// The answer to a request for a ranking, and the time of its round trip.
pub struct TimedAnswer {
    /// `None` if the request was refused for lack of time.
    pub answer: Option<RankAnswer>,
    /// The round trip.
    pub took: Duration,
}

impl DemoClient {
    /// A client of the daemon at `url`, which sends users and items of a data set.
    ///
    /// # Errors
    /// The data set's ids are strings, and their dictionary cannot be read.
    pub fn new(url: String, dataset: &Dataset) -> Result<Self> {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
            .build();
        let (schema, ids) = (dataset.schema.clone(), IdTexts::load(dataset)?);
        let converter = Converter::new(schema.clone());
        Ok(Self { url, agent: ureq::Agent::new_with_config(agent), schema, converter, ids })
    }

    /// Ranks requests on a few threads. The answers are in the order of the requests.
    ///
    /// # Errors
    /// A daemon that cannot be reached or rejects a request.
    pub fn rank_all(&self, requests: &[RankRequest]) -> Result<Vec<TimedAnswer>> {
        let share = requests.len().div_ceil(THREADS).max(1);
        let rank = |part: &[RankRequest]| part.iter().map(|request| self.rank(request)).collect();
        let parts: Result<Vec<Vec<TimedAnswer>>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                requests.chunks(share).map(|part| scope.spawn(move || rank(part))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        Ok(parts?.into_iter().flatten().collect())
    }

    fn rank(&self, request: &RankRequest) -> Result<TimedAnswer> {
        let start = Instant::now();
        let answer = self.post("/v1/rank", request)?;
        Ok(TimedAnswer { answer, took: start.elapsed() })
    }

    /// The request that showed `rows`, with every row as a candidate, and with its explanation.
    pub fn explained_request(&self, rows: &[Impression]) -> RankRequest {
        RankRequest { request: None, explain: true, ..self.rank_request(rows.iter()) }
    }

    /// The request that showed `rows`, with its id, and each item once.
    pub fn live_request(&self, rows: &[Impression]) -> RankRequest {
        self.rank_request(distinct_items(rows))
    }

    fn rank_request<'a>(&self, rows: impl Iterator<Item = &'a Impression>) -> RankRequest {
        let mut rows = rows.peekable();
        let first = *rows.peek().expect("a request shows at least one item");
        let candidate = |row: &Impression| RankCandidate {
            id: self.ids.item(row.item),
            features: self.converter.named(&row.context),
        };
        RankRequest {
            user: self.ids.user(first.user),
            surface: self.surface(first),
            candidates: rows.map(candidate).collect(),
            request: Some(request_id(first)),
            time_ms: Some(first.time_ms),
            limit: None,
            context: BTreeMap::new(),
            explain: false,
        }
    }

    /// The impressions of a request, without their outcomes.
    pub fn impressions(&self, rows: &[Impression]) -> Vec<ImpressionBody> {
        let body = |row: &Impression| ImpressionBody {
            id: None,
            request: request_id(row),
            user: self.ids.user(row.user),
            item: self.ids.item(row.item),
            surface: self.surface(row),
            time_ms: row.time_ms,
            context: self.converter.named(&row.context),
        };
        distinct_items(rows).map(body).collect()
    }

    /// An impression together with its outcome.
    pub fn event(&self, row: &Impression) -> EventBody {
        let ActionBody { request, item, time_ms, actions, values, .. } = self.action(row);
        EventBody {
            id: None,
            request,
            user: self.ids.user(row.user),
            item,
            surface: self.surface(row),
            time_ms: row.time_ms,
            actions,
            values,
            context: self.converter.named(&row.context),
            outcome_ms: Some(time_ms),
        }
    }

    /// The outcome of an impression.
    pub fn action(&self, row: &Impression) -> ActionBody {
        let (schema, outcome) = (&self.schema, &row.outcome);
        let known = |bit: &usize| outcome.known >> bit & 1 == 1;
        let happened = |bit: usize| (schema.actions[bit].clone(), outcome.actions >> bit & 1 == 1);
        let values = schema.values.iter().zip(outcome.values);
        ActionBody {
            id: None,
            request: request_id(row),
            item: self.ids.item(row.item),
            user: Some(self.ids.user(row.user)),
            time_ms: row.outcome_ms,
            actions: (0..schema.actions.len()).filter(known).map(happened).collect(),
            values: values
                .filter(|(_, value)| value.is_finite())
                .map(|(name, value)| (name.clone(), value))
                .collect(),
            complete: true,
        }
    }

    /// Sends events in parts until each is accepted: items and users first, impressions before
    /// actions, the clock last.
    ///
    /// # Errors
    /// A daemon that rejects them, or is overloaded for too long.
    pub fn send(&self, events: EventsRequest) -> Result<()> {
        let EventsRequest { events, impressions, actions, items, users, clock_ms } = events;
        for part in items.chunks(EVENTS_PER_BODY) {
            self.send_part(EventsRequest { items: part.to_vec(), ..Default::default() })?;
        }
        for part in users.chunks(EVENTS_PER_BODY) {
            self.send_part(EventsRequest { users: part.to_vec(), ..Default::default() })?;
        }
        for part in events.chunks(EVENTS_PER_BODY) {
            self.send_part(EventsRequest { events: part.to_vec(), ..Default::default() })?;
        }
        for part in impressions.chunks(EVENTS_PER_BODY) {
            self.send_part(EventsRequest { impressions: part.to_vec(), ..Default::default() })?;
        }
        for part in actions.chunks(EVENTS_PER_BODY) {
            self.send_part(EventsRequest { actions: part.to_vec(), ..Default::default() })?;
        }
        if clock_ms.is_some() {
            self.send_part(EventsRequest { clock_ms, ..Default::default() })?;
        }
        Ok(())
    }

    fn send_part(&self, part: EventsRequest) -> Result<()> {
        for _ in 0..ATTEMPTS {
            if self.post::<EventsAnswer>("/v1/events", &part)?.is_some() {
                return Ok(());
            }
            std::thread::sleep(RETRY_AFTER);
        }
        Err(Error::unreachable(format!(
            "{}/v1/events refused events {ATTEMPTS} times for lack of time",
            self.url
        )))
    }

    /// The numbers of the live page.
    ///
    /// # Errors
    /// A daemon that cannot be reached.
    pub fn live(&self) -> Result<serde_json::Value> {
        let url = format!("{}/v1/live", self.url);
        let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
        let mut response = self.agent.get(&url).call().map_err(failed)?;
        response.body_mut().read_json().map_err(failed)
    }

    /// The answer, or `None` if there was no time for one.
    fn post<A: DeserializeOwned>(&self, route: &str, body: &impl Serialize) -> Result<Option<A>> {
        let url = format!("{}{route}", self.url);
        let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
        let mut response = self.agent.post(&url).send_json(body).map_err(failed)?;
        match response.status().as_u16() {
            200 => response.body_mut().read_json().map(Some).map_err(failed),
            503 | 504 => Ok(None),
            status => {
                let text = response.body_mut().read_to_string().unwrap_or_default();
                Err(Error::internal(format!("{url} answered {status}: {text}")))
            }
        }
    }

    fn surface(&self, row: &Impression) -> String {
        self.schema.surfaces[usize::from(row.surface)].clone()
    }
}

/// The id of a request, above 0 as the API wants it.
fn request_id(row: &Impression) -> u64 {
    row.request + 1
}

/// Each item of a request once: an item that was shown twice at once is one impression.
fn distinct_items(rows: &[Impression]) -> impl Iterator<Item = &Impression> {
    let mut seen = BTreeSet::new();
    rows.iter().filter(move |row| seen.insert(row.item))
}
