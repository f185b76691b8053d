//! Callers that tell of events at a rate: impressions, and a second later what
//! came of each. A body leaves at its time whether or not earlier ones have been
//! acknowledged, as long as a thread is free; its wait for one counts.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use super::{ITEMS, USERS};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::clock::now_ms;
use hypercast_serve::api::{ActionBody, EventsRequest, ImpressionBody};

/// Impressions of a request.
pub const SHOWN: u64 = 5;

/// Threads that send.
const THREADS: usize = 4;

/// Tries of a body.
const TRIES: usize = 50;

/// What is offered.
#[derive(Debug, Clone, Copy)]
pub struct Offer {
    /// Events a second: half are impressions.
    pub rate: f64,
    /// Events of a body.
    pub batch: u64,
    /// For how long.
    pub lasting: Duration,
    /// Whether nothing more will come after an action, so that no window is waited for.
    pub complete: bool,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub struct Acknowledged {
    /// Milliseconds from the time at which a body was due to its acknowledgement.
    pub ack_ms: Vec<f64>,
    /// Events.
    pub events: u64,
    /// Of them, impressions.
    pub impressions: u64,
    /// Bodies that had to be sent again.
    pub again: u64,
    /// From the first due body to the last acknowledgement.
    pub seconds: f64,
}

impl Offer {
    fn bodies(&self) -> u64 {
        (self.lasting.as_secs_f64() * self.rate / self.batch as f64) as u64
    }

    /// Impressions of a body.
    fn shown(&self) -> u64 {
        self.batch / 2
    }

    /// Bodies between an impression's and its action's.
    fn later(&self) -> u64 {
        (self.rate / self.batch as f64).ceil() as u64
    }

    /// Sends to `url` until the end; `meanwhile` runs on this thread.
    ///
    /// # Errors
    /// A server that refuses a body for good; that of `meanwhile`.
    pub fn send(&self, url: &str, meanwhile: impl FnOnce() -> Result<()>) -> Result<Acknowledged> {
        let (next, start) = (AtomicU64::new(0), Instant::now());
        let send = || self.send_some(url, &next, start);
        let all: Vec<Result<Acknowledged>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(send)).collect();
            let waited = meanwhile();
            let joined = threads.into_iter().map(|thread| thread.join().expect("no panic"));
            let mut all: Vec<_> = joined.collect();
            all.extend(waited.err().map(Err));
            all
        });
        let mut sum = Acknowledged::default();
        for part in all {
            let part = part?;
            sum.ack_ms.extend(part.ack_ms);
            sum.events += part.events;
            sum.impressions += part.impressions;
            sum.again += part.again;
            sum.seconds = sum.seconds.max(part.seconds);
        }
        Ok(sum)
    }

    fn send_some(&self, url: &str, next: &AtomicU64, start: Instant) -> Result<Acknowledged> {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build()
            .new_agent();
        let mut sum = Acknowledged::default();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= self.bodies() {
                sum.seconds = start.elapsed().as_secs_f64();
                return Ok(sum);
            }
            let due = start + Duration::from_secs_f64((at * self.batch) as f64 / self.rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let body = self.body(at);
            sum.again += post(&agent, url, &body)?;
            sum.ack_ms.push(due.elapsed().as_secs_f64() * 1e3);
            sum.events += body.len() as u64;
            sum.impressions += body.impressions.len() as u64;
        }
    }

    /// A body: new impressions, and what came of those of a second ago.
    fn body(&self, at: u64) -> EventsRequest {
        let time_ms = now_ms();
        let impressions = self.ids(at).map(|id| ImpressionBody {
            id: None,
            request: request(id),
            user: request(id) % USERS as u64 + 1,
            item: item(id),
            surface: surface(id),
            time_ms,
            context: BTreeMap::new(),
        });
        let before = at.checked_sub(self.later()).into_iter().flat_map(|at| self.ids(at));
        let actions = before.map(|id| ActionBody {
            id: None,
            request: request(id),
            item: item(id),
            user: None,
            time_ms,
            actions: BTreeMap::from([("click".into(), id % 3 == 0)]),
            values: BTreeMap::new(),
            complete: self.complete,
        });
        EventsRequest {
            impressions: impressions.collect(),
            actions: actions.collect(),
            ..EventsRequest::default()
        }
    }

    fn ids(&self, at: u64) -> std::ops::Range<u64> {
        at * self.shown()..(at + 1) * self.shown()
    }
}

/// The place of an impression among all, from its request and item; see [`item`].
pub fn place(request: u64, item_id: u64) -> Option<u64> {
    let first = request.checked_sub(1)? * SHOWN;
    (first..first + SHOWN).find(|&id| item(id) == item_id)
}

fn request(id: u64) -> u64 {
    id / SHOWN + 1
}

/// Items of one request differ.
fn item(id: u64) -> u64 {
    (id + id / ITEMS as u64) % ITEMS as u64 + 1
}

fn surface(id: u64) -> String {
    if request(id).is_multiple_of(2) { "feed".into() } else { "search".into() }
}

/// Sends until it is taken; how often it had to be sent again.
fn post(agent: &ureq::Agent, url: &str, body: &EventsRequest) -> Result<u64> {
    let mut said = String::new();
    for tries in 0..TRIES {
        match agent.post(url).send_json(body) {
            Ok(mut answer) => {
                let status = answer.status().as_u16();
                said = answer.body_mut().read_to_string().unwrap_or_default();
                match status {
                    200 => return Ok(tries as u64),
                    503 | 504 => {}
                    _ => break,
                }
            }
            Err(error) => said = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Error::unreachable(format!("{url} does not take events: {said}")))
}
