//! Clients that send events at a rate: impressions, and a second later the action of each. A body
//! leaves at its time whether or not earlier ones have been acknowledged, as long as a thread is
//! free; waiting for one counts as latency.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hypercast_core::clock::now_ms;
use hypercast_serve::api::{ActionBody, EventsRequest, ImpressionBody};

use super::{ITEMS, USERS};
use crate::error::{CommonErrors as _, Error, Result};

/// Impressions per request.
const SHOWN: u64 = 5;

const THREADS: usize = 4;

/// Attempts per body.
const ATTEMPTS: usize = 50;

/// The events to send.
#[derive(Debug, Clone, Copy)]
pub struct EventLoad {
    /// Events a second: half are impressions.
    pub rate: f64,
    /// Events per body.
    pub batch: u64,
    /// Duration.
    pub lasting: Duration,
    /// Whether actions complete their impressions, so that the joiner need not wait for windows.
    pub complete: bool,
}

/// What was sent and acknowledged.
#[derive(Debug, Clone, Default)]
pub struct EventLoadResult {
    /// Milliseconds from the time at which a body was due to its acknowledgement.
    pub ack_ms: Vec<f64>,
    /// Acknowledged events.
    pub events: u64,
    /// Impressions among them.
    pub impressions: u64,
    /// Attempts that had to be repeated.
    pub retries: u64,
    /// From the first body to the last acknowledgement.
    pub seconds: f64,
}

impl EventLoad {
    fn bodies(&self) -> u64 {
        (self.lasting.as_secs_f64() * self.rate / self.batch as f64) as u64
    }

    /// Impressions of a body.
    fn impressions_per_body(&self) -> u64 {
        self.batch / 2
    }

    /// Bodies between an impression's and its action's.
    fn later(&self) -> u64 {
        (self.rate / self.batch as f64).ceil() as u64
    }

    /// Sends to `url` until the end; `meanwhile` runs on this thread.
    ///
    /// # Errors
    /// A server that rejects a body.
    pub fn send(&self, url: &str, meanwhile: impl FnOnce()) -> Result<EventLoadResult> {
        let (next, start) = (AtomicU64::new(0), Instant::now());
        let sum = Mutex::new(EventLoadResult::default());
        std::thread::scope(|scope| {
            let send = || self.send_some(url, &next, start, &sum);
            let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(send)).collect();
            meanwhile();
            let mut joined = threads.into_iter().map(|thread| thread.join().expect("no panic"));
            joined.try_for_each(|sent| sent)
        })?;
        let sum = sum.into_inner().expect("no thread panicked");
        Ok(EventLoadResult { seconds: start.elapsed().as_secs_f64(), ..sum })
    }

    fn send_some(
        &self,
        url: &str,
        next: &AtomicU64,
        start: Instant,
        sum: &Mutex<EventLoadResult>,
    ) -> Result<()> {
        let agent = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(30)))
            .build()
            .new_agent();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= self.bodies() {
                return Ok(());
            }
            let due = start + Duration::from_secs_f64((at * self.batch) as f64 / self.rate);
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            let body = self.body(at);
            let retries = post(&agent, url, &body)?;
            let ack_ms = due.elapsed().as_secs_f64() * 1e3;
            let mut sum = sum.lock().expect("no thread panicked");
            sum.ack_ms.push(ack_ms);
            sum.retries += retries;
            sum.events += body.len() as u64;
            sum.impressions += body.impressions.len() as u64;
        }
    }

    /// New impressions, and the actions on those of a second ago.
    fn body(&self, at: u64) -> EventsRequest {
        let time_ms = now_ms();
        let impressions = self.ids(at).map(|id| ImpressionBody {
            id: None,
            request: request(id),
            user: (request(id) % USERS as u64 + 1).into(),
            item: item(id).into(),
            surface: surface(id),
            time_ms,
            context: BTreeMap::new(),
        });
        let before = at.checked_sub(self.later()).into_iter().flat_map(|at| self.ids(at));
        let actions = before.map(|id| ActionBody {
            id: None,
            request: request(id),
            item: item(id).into(),
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
        at * self.impressions_per_body()..(at + 1) * self.impressions_per_body()
    }
}

/// The index of an impression among all, from its request and item; see [`item`].
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

/// Sends until the body is accepted; returns how often it had to be repeated.
fn post(agent: &ureq::Agent, url: &str, body: &EventsRequest) -> Result<u64> {
    let mut reason = String::new();
    for tries in 0..ATTEMPTS {
        match agent.post(url).send_json(body) {
            Ok(mut answer) => {
                let status = answer.status().as_u16();
                reason = answer.body_mut().read_to_string().unwrap_or_default();
                match status {
                    200 => return Ok(tries as u64),
                    503 | 504 => {}
                    _ => break,
                }
            }
            Err(error) => reason = error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Error::unreachable(format!("{url} does not accept events: {reason}")))
}
