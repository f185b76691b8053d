//! Open-loop load: requests leave at their times whether or not earlier ones have been answered,
//! and latency counts from the time at which a request should have left.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use hypercast_core::quantile::quantile;
use tokio::{runtime::Runtime, task::JoinSet};

use crate::{
    error::{CommonErrors as _, Error, Result},
    processes::DaemonProcess,
};

/// The body of the n-th request.
pub type BodySource = Box<dyn Fn(u64) -> Bytes + Send + Sync>;

/// A client with a thread of its own.
pub struct OpenLoopClient {
    runtime: Runtime,
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    bodies: BodySource,
    sent: AtomicU64,
}

/// The result of a stretch of load.
#[derive(Debug, Clone, Default)]
pub struct LoadResult {
    /// Milliseconds of requests that were answered.
    pub answered_ms: Vec<f64>,
    /// Milliseconds of requests that were refused (503).
    pub refused_ms: Vec<f64>,
    /// Requests that were admitted and then not answered in time (504).
    pub late: usize,
    /// Requests with any other result.
    pub failed: usize,
    /// Duration of the stretch in seconds.
    pub seconds: f64,
}

impl LoadResult {
    /// Requests per second that were answered within `within_ms`.
    pub fn goodput(&self, within_ms: f64) -> f64 {
        self.answered_ms.iter().filter(|&&ms| ms <= within_ms).count() as f64 / self.seconds
    }

    /// A quantile of the answered requests in milliseconds; infinite without any.
    pub fn answered(&self, share: f64) -> f64 {
        if self.answered_ms.is_empty() {
            return f64::INFINITY;
        }
        quantile(&mut self.answered_ms.clone(), share)
    }

    /// Requests of all outcomes together.
    pub fn requests(&self) -> usize {
        self.answered_ms.len() + self.refused_ms.len() + self.late + self.failed
    }
}

impl OpenLoopClient {
    /// A client of `POST {url}`.
    ///
    /// # Errors
    /// A runtime that cannot be started.
    pub fn new(url: String, bodies: BodySource) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Error::internal(format!("cannot start a client: {error}")))?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self { runtime, client, url, bodies, sent: AtomicU64::new(0) })
    }

    /// A client that sends the given bodies in turn.
    ///
    /// # Errors
    /// As [`OpenLoopClient::new`].
    pub fn cycle(url: String, bodies: Vec<String>) -> Result<Self> {
        let bodies: Vec<Bytes> = bodies.into_iter().map(Bytes::from).collect();
        Self::new(url, Box::new(move |at| bodies[at as usize % bodies.len()].clone()))
    }

    fn next_body(&self) -> Bytes {
        (self.bodies)(self.sent.fetch_add(1, Ordering::Relaxed))
    }

    /// Sends `rate` requests per second for a while, and waits for the last answer.
    pub fn send(&self, rate: f64, lasting: Duration) -> LoadResult {
        self.runtime.block_on(async {
            let (start, count) = (Instant::now(), (rate * lasting.as_secs_f64()) as usize);
            let mut requests = JoinSet::new();
            for index in 0..count {
                let due = start + Duration::from_secs_f64(index as f64 / rate);
                tokio::time::sleep_until(due.into()).await;
                requests.spawn(post(self.client.clone(), self.url.clone(), self.next_body(), due));
            }
            let mut result = LoadResult { seconds: lasting.as_secs_f64(), ..Default::default() };
            while let Some(answer) = requests.join_next().await {
                match answer {
                    Ok((200, ms)) => result.answered_ms.push(ms),
                    Ok((503, ms)) => result.refused_ms.push(ms),
                    Ok((504, _)) => result.late += 1,
                    Ok(_) | Err(_) => result.failed += 1,
                }
            }
            result
        })
    }

    /// Sends requests one after the other; the milliseconds of each.
    pub fn one_by_one(&self, count: usize) -> Vec<f64> {
        let one = |_| {
            let (client, url, body) = (self.client.clone(), self.url.clone(), self.next_body());
            self.runtime.block_on(post(client, url, body, Instant::now())).1
        };
        (0..count).map(one).collect()
    }

    /// The median milliseconds of one request at a time, after some that warm up.
    pub fn alone_ms(&self) -> f64 {
        self.one_by_one(200);
        quantile(&mut self.one_by_one(400), 0.5)
    }
}

/// The status (0 without one), and the milliseconds since `due`.
async fn post(
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    body: Bytes,
    due: Instant,
) -> (u16, f64) {
    let request = axum::http::Request::post(url)
        .header("content-type", "application/json")
        .body(Full::new(body))
        .expect("the address was parsed before");
    let status = async {
        let response = client.request(request).await.ok()?;
        let status = response.status().as_u16();
        response.into_body().collect().await.ok().map(|_| status)
    };
    (status.await.unwrap_or(0), due.elapsed().as_secs_f64() * 1e3)
}

/// The metrics of a daemon at one moment.
pub struct MetricsSnapshot(String);

impl MetricsSnapshot {
    /// Reads `/metrics`.
    ///
    /// # Errors
    /// A daemon that does not answer.
    pub fn read(daemon: &DaemonProcess) -> Result<Self> {
        let url = format!("{}/metrics", daemon.url);
        let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
        let mut response = ureq::get(&url).call().map_err(failed)?;
        response.body_mut().read_to_string().map(Self).map_err(failed)
    }

    /// The sum of a metric over the label sets that contain `label`.
    pub fn sum(&self, name: &str, label: &str) -> f64 {
        let is_metric = |line: &&str| {
            line.strip_prefix(name)
                .is_some_and(|rest| rest.starts_with('{') && rest.contains(label))
        };
        let values = self.0.lines().filter(is_metric);
        values.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }
}
