//! How every route answers: work on the right threads within the deadline, bodies within their
//! bounds, and refusals as JSON with a status and a code.

use std::time::{Duration, Instant};

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use hypercast_stream::events::AppendReceipt;
use serde::{Serialize, de::DeserializeOwned};
use tokio::sync::oneshot;

use crate::{
    http::server::AppState,
    metrics::Metrics,
    request::{
        api::{DEADLINE_HEADER, EventsRequest, Refusal, RefusalBody, RefusalText, RequestResult},
        workers::Workers,
    },
};

/// Time limit for reading a body; it leaves time for a push of many megabytes.
pub(crate) const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs a part of a request on a worker thread, unless the deadline passes first.
pub(crate) async fn on_worker<T: Send + 'static>(
    app: &AppState,
    deadline: Instant,
    run: impl FnOnce() -> RequestResult<T> + Send + 'static,
) -> RequestResult<T> {
    on_pool(&app.workers, deadline, run).await
}

/// Like [`on_worker`], on another pool.
pub(crate) async fn on_pool<T: Send + 'static>(
    workers: &Workers,
    deadline: Instant,
    run: impl FnOnce() -> RequestResult<T> + Send + 'static,
) -> RequestResult<T> {
    let (done, result) = oneshot::channel();
    workers
        .submit(move || {
            // The caller does not wait past the deadline, and a late result would only delay
            // others.
            if Instant::now() < deadline && !done.is_closed() {
                let _ = done.send(run());
            }
        })
        .map_err(|_| Refusal::Overloaded { retry_after_ms: 100 })?;
    match tokio::time::timeout_at(deadline.into(), result).await {
        Ok(Ok(answer)) => answer,
        // The job ended without a result: it was too late, or it panicked.
        Ok(Err(_)) if Instant::now() < deadline => {
            Err(Refusal::Internal("the request failed inside the host; see its log".into()))
        }
        Ok(Err(_)) | Err(_) => Err(Refusal::Deadline),
    }
}

/// Time left for a request: what the caller's header says, at most `most_ms`.
///
/// # Errors
/// The header is not a number.
pub(crate) fn time_left(headers: &HeaderMap, most_ms: u64) -> RequestResult<Duration> {
    let Some(value) = headers.get(DEADLINE_HEADER) else {
        return Ok(Duration::from_millis(most_ms));
    };
    let left_ms =
        value.to_str().ok().and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| {
            Refusal::BadRequest(format!(
                "{DEADLINE_HEADER}: {value:?} is not a number of milliseconds"
            ))
        })?;
    Ok(Duration::from_millis(left_ms.min(most_ms)))
}

/// Awaits an answer, measures its time and counts it.
pub(crate) async fn timed(
    metrics: &Metrics,
    route: &'static str,
    answering: impl Future<Output = RequestResult<Response>>,
) -> Response {
    let start = Instant::now();
    let response = answering.await.unwrap_or_else(|refusal| refuse(&refusal));
    metrics.request(route, response.status().as_u16(), start.elapsed());
    response
}

/// Reads the body of `POST /v1/events` and stores its events on a worker thread.
pub(crate) async fn store_events(
    workers: &Workers,
    body: Body,
    most_bytes: usize,
    deadline: Instant,
    store: impl FnOnce(&EventsRequest) -> RequestResult<AppendReceipt> + Send + 'static,
) -> RequestResult<AppendReceipt> {
    let body = bytes(body, most_bytes).await?;
    on_pool(workers, deadline, move || store(&parse_json(&body)?)).await
}

/// A body in JSON.
pub(crate) fn parse_json<Q: DeserializeOwned>(body: &[u8]) -> RequestResult<Q> {
    serde_json::from_slice(body).map_err(|error| Refusal::BadRequest(format!("the body: {error}")))
}

/// The text of `/metrics`.
pub(crate) fn metrics_text(metrics: &Metrics) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render()).into_response()
}

pub(crate) fn refuse(refusal: &Refusal) -> Response {
    let (status, code) = refusal.code();
    let mut response = refuse_with(status, code, &refusal.to_string());
    if let Refusal::Overloaded { retry_after_ms } = refusal {
        // The header has whole seconds.
        let seconds = retry_after_ms.div_ceil(1000).max(1);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

pub(crate) fn refuse_with(status: u16, code: &str, message: &str) -> Response {
    let body = RefusalBody { error: RefusalText { code: code.into(), message: message.into() } };
    json(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &body)
}

pub(crate) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Reads a body of at most `most` bytes.
///
/// # Errors
/// The body is longer, breaks off, or does not arrive within [`BODY_TIMEOUT`].
pub(crate) async fn bytes(body: axum::body::Body, most: usize) -> RequestResult<Bytes> {
    let reading = axum::body::to_bytes(body, most);
    let Ok(read) = tokio::time::timeout(BODY_TIMEOUT, reading).await else {
        let waited_s = BODY_TIMEOUT.as_secs();
        return Err(Refusal::BadRequest(format!("the body did not arrive within {waited_s} s")));
    };
    read.map_err(|_| {
        Refusal::BadRequest(format!("the body is over {most} bytes (max_body_bytes), or broke off"))
    })
}
