//! Open-loop load: requests leave at their times whether or not earlier ones have
//! been answered, and latency counts from the time at which one should have left.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::{runtime::Runtime, task::JoinSet};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::quantile::quantile;

/// A caller with its own threads.
pub struct Caller {
    runtime: Runtime,
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    bodies: Arc<[Bytes]>,
}

/// What came of a stretch of load.
#[derive(Debug, Clone, Default)]
pub struct Stretch {
    /// Milliseconds of requests that were answered.
    pub answered_ms: Vec<f64>,
    /// Milliseconds of requests that were refused (503).
    pub refused_ms: Vec<f64>,
    /// Requests that were let in and then not answered in time (504).
    pub late: usize,
    /// Requests that got anything else.
    pub failed: usize,
    /// How long it lasted, in seconds.
    pub seconds: f64,
}

impl Stretch {
    /// Requests a second that were answered within so many milliseconds.
    pub fn goodput(&self, within_ms: f64) -> f64 {
        self.answered_ms.iter().filter(|&&ms| ms <= within_ms).count() as f64 / self.seconds
    }

    /// A quantile of what was answered; infinite if nothing was.
    pub fn answered(&self, share: f64) -> f64 {
        match self.answered_ms.is_empty() {
            true => f64::INFINITY,
            false => quantile(&mut self.answered_ms.clone(), share),
        }
    }

    /// All requests.
    pub fn requests(&self) -> usize {
        self.answered_ms.len() + self.refused_ms.len() + self.late + self.failed
    }
}

impl Caller {
    /// A caller of `POST {url}` with these bodies in turn.
    ///
    /// # Errors
    /// A runtime that cannot be started.
    pub fn new(url: String, bodies: Vec<String>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| Error::invalid(format!("cannot start a caller: {error}")))?;
        let client = Client::builder(TokioExecutor::new()).build_http();
        Ok(Self { runtime, client, url, bodies: bodies.into_iter().map(Bytes::from).collect() })
    }

    /// Sends `rate` requests a second for a while, and waits for the last answer.
    pub fn send(&self, rate: f64, lasting: Duration) -> Stretch {
        self.runtime.block_on(async {
            let (start, count) = (Instant::now(), (rate * lasting.as_secs_f64()) as usize);
            let mut asked = JoinSet::new();
            for index in 0..count {
                let due = start + Duration::from_secs_f64(index as f64 / rate);
                tokio::time::sleep_until(due.into()).await;
                asked.spawn(ask(
                    self.client.clone(),
                    self.url.clone(),
                    self.bodies[index % self.bodies.len()].clone(),
                    due,
                ));
            }
            let mut stretch = Stretch { seconds: lasting.as_secs_f64(), ..Stretch::default() };
            while let Some(answer) = asked.join_next().await {
                match answer {
                    Ok((200, ms)) => stretch.answered_ms.push(ms),
                    Ok((503, ms)) => stretch.refused_ms.push(ms),
                    Ok((504, _)) => stretch.late += 1,
                    Ok(_) | Err(_) => stretch.failed += 1,
                }
            }
            stretch
        })
    }

    /// Requests one after the other: milliseconds of each.
    pub fn one_by_one(&self, count: usize) -> Vec<f64> {
        let mut took = Vec::with_capacity(count);
        for body in self.bodies.iter().cycle().take(count) {
            let asked = ask(self.client.clone(), self.url.clone(), body.clone(), Instant::now());
            took.push(self.runtime.block_on(asked).1);
        }
        took
    }
}

/// The status (0 without one), and milliseconds since `due`.
async fn ask(
    client: Client<HttpConnector, Full<Bytes>>,
    url: String,
    body: Bytes,
    due: Instant,
) -> (u16, f64) {
    let request = axum::http::Request::post(url)
        .header("content-type", "application/json")
        .body(Full::new(body))
        .expect("the address was parsed before");
    let status = match client.request(request).await {
        Ok(response) => {
            let status = response.status().as_u16();
            match response.into_body().collect().await {
                Ok(_) => status,
                Err(_) => 0,
            }
        }
        Err(_) => 0,
    };
    (status, due.elapsed().as_secs_f64() * 1e3)
}
