//! The demo as a caller of the daemon: rankings, events, and what the page shows.
//!
//! Events are sent again until they are taken, which changes nothing where they were. A request that is refused is
//! counted and goes without predictions.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Serialize, de::DeserializeOwned};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::Impression;
use hypercast_data::schema::Schema;
use hypercast_serve::{
    api::{
        ActionBody, RankCandidate, EventBody, EventsAnswer, EventsRequest, ImpressionBody, RankAnswer,
        RankRequest,
    },
    convert::Converter,
};

/// Client threads.
const THREADS: usize = 2;

/// How often events are sent again, and how long after.
const TRIES: u32 = 100;
const TRY_AFTER: Duration = Duration::from_millis(100);

/// How long the daemon may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);

/// A caller.
pub struct Client {
    /// Where the daemon listens.
    pub url: String,
    agent: ureq::Agent,
    schema: Arc<Schema>,
    converter: Converter,
}

/// An answer, if there was one, and how long its caller waited for it.
pub struct Answered {
    /// The answer; none if the request was refused.
    pub answer: Option<RankAnswer>,
    /// The round trip.
    pub took: Duration,
}

impl Client {
    /// A caller of the daemon at `url`.
    pub fn new(url: String, schema: Arc<Schema>) -> Self {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(PATIENCE))
            .build();
        let converter = Converter::new(schema.clone());
        Self { url, agent: ureq::Agent::new_with_config(agent), schema, converter }
    }

    /// Ranks requests, over a few threads; the answers are in their order.
    ///
    /// # Errors
    /// A daemon that cannot be reached, or answers something else.
    pub fn rank(&self, requests: &[Vec<Impression>]) -> Result<Vec<Answered>> {
        let share = requests.len().div_ceil(THREADS).max(1);
        let parts: Vec<Result<Vec<Answered>>> = std::thread::scope(|scope| {
            let all =
                |part: &[Vec<Impression>]| part.iter().map(|rows| self.rank_one(rows)).collect();
            let threads: Vec<_> =
                requests.chunks(share).map(|part| scope.spawn(move || all(part))).collect();
            threads
                .into_iter()
                .map(|thread| thread.join().expect("a client thread does not panic"))
                .collect()
        });
        let mut answers = Vec::with_capacity(requests.len());
        for part in parts {
            answers.extend(part?);
        }
        Ok(answers)
    }

    fn rank_one(&self, rows: &[Impression]) -> Result<Answered> {
        let first = &rows[0];
        let candidate = |row: &Impression| RankCandidate {
            id: row.item,
            features: self.converter.named(&row.context),
        };
        let request = RankRequest {
            user: first.user,
            surface: self.surface(first),
            candidates: distinct(rows).map(candidate).collect(),
            request: Some(request_id(first)),
            time_ms: Some(first.time_ms),
            limit: None,
            context: BTreeMap::new(),
            explain: false,
        };
        let start = Instant::now();
        let answer = self.post("/v1/rank", &request)?;
        Ok(Answered { answer, took: start.elapsed() })
    }

    /// What a request showed.
    pub fn shown(&self, rows: &[Impression]) -> Vec<ImpressionBody> {
        let body = |row: &Impression| ImpressionBody {
            id: None,
            request: request_id(row),
            user: row.user,
            item: row.item,
            surface: self.surface(row),
            time_ms: row.time_ms,
            context: self.converter.named(&row.context),
        };
        distinct(rows).map(body).collect()
    }

    /// An impression with all that came of it.
    pub fn whole(&self, row: &Impression) -> EventBody {
        let ActionBody { request, item, time_ms, actions, values, .. } = self.action(row);
        EventBody {
            id: None,
            request,
            user: row.user,
            item,
            surface: self.surface(row),
            time_ms: row.time_ms,
            actions,
            values,
            context: self.converter.named(&row.context),
            outcome_ms: Some(time_ms),
        }
    }

    /// All that came of an impression.
    pub fn action(&self, row: &Impression) -> ActionBody {
        let (schema, outcome) = (&self.schema, &row.outcome);
        let known = |bit: &usize| outcome.known >> bit & 1 == 1;
        let happened = |bit: usize| (schema.actions[bit].clone(), outcome.actions >> bit & 1 == 1);
        let values = schema.values.iter().zip(outcome.values);
        ActionBody {
            id: None,
            request: request_id(row),
            item: row.item,
            user: Some(row.user),
            time_ms: row.outcome_ms,
            actions: (0..schema.actions.len()).filter(known).map(happened).collect(),
            values: values
                .filter(|(_, value)| value.is_finite())
                .map(|(name, value)| (name.clone(), value))
                .collect(),
            complete: true,
        }
    }

    /// Tells of events until they are taken.
    ///
    /// # Errors
    /// A daemon that refuses them for good.
    pub fn tell(&self, events: &EventsRequest) -> Result<()> {
        if events.is_empty() && events.clock_ms.is_none() {
            return Ok(());
        }
        for _ in 0..TRIES {
            if self.post::<EventsAnswer>("/v1/events", events)?.is_some() {
                return Ok(());
            }
            std::thread::sleep(TRY_AFTER);
        }
        Err(Error::unreachable(format!(
            "{}/v1/events refused {TRIES} times, for lack of time, to take events",
            self.url
        )))
    }

    /// What the page shows now.
    ///
    /// # Errors
    /// A daemon that cannot be reached.
    pub fn live(&self) -> Result<serde_json::Value> {
        let url = format!("{}/v1/live", self.url);
        let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
        let mut response = self.agent.get(&url).call().map_err(failed)?;
        response.body_mut().read_json().map_err(failed)
    }

    /// The answer, or none where there was no time for one.
    fn post<A: DeserializeOwned>(&self, route: &str, body: &impl Serialize) -> Result<Option<A>> {
        let url = format!("{}{route}", self.url);
        let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
        let mut response = self.agent.post(&url).send_json(body).map_err(failed)?;
        match response.status().as_u16() {
            200 => response.body_mut().read_json().map(Some).map_err(failed),
            503 | 504 => Ok(None),
            status => {
                let text = response.body_mut().read_to_string().unwrap_or_default();
                Err(Error::invalid(format!("{url} answered {status}: {text}")))
            }
        }
    }

    fn surface(&self, row: &Impression) -> String {
        self.schema.surfaces[usize::from(row.surface)].clone()
    }
}

/// A request's id, above 0 as callers' ids are.
fn request_id(row: &Impression) -> u64 {
    row.request + 1
}

/// Each item of a request once: what was shown twice at once is one impression.
fn distinct(rows: &[Impression]) -> impl Iterator<Item = &Impression> {
    let mut seen = BTreeSet::new();
    rows.iter().filter(move |row| seen.insert(row.item))
}
