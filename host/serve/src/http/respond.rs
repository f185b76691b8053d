//! How every route answers: work on the right threads within the deadline, and refusals as JSON
//! with a status and a code.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json,
    extract::{Request, State},
    http::{HeaderMap, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use hypercast_core::{error::ErrorKind, supervised_thread};
use hypercast_stream::events::AppendReceipt;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::{Semaphore, oneshot};

use crate::{
    error::Error,
    http::{auth::Caller, bodies::ReceivedBody},
    metrics::Metrics,
    request::{
        api::{DEADLINE_HEADER, EventsRequest, Refusal, RefusalBody, RefusalText, RequestResult},
        events::EventIntake,
        workers::Workers,
    },
    versions::serving_set::ServingSet,
};

/// Runs a part of a request on a worker thread, unless the deadline passes first.
pub(crate) async fn on_worker<T: Send + 'static>(
    workers: &Workers,
    deadline: Instant,
    run: impl FnOnce() -> RequestResult<T> + Send + 'static,
) -> RequestResult<T> {
    let (done, result) = oneshot::channel();
    workers.submit(move || {
        // The caller does not wait past the deadline, and a late result would only delay others.
        if Instant::now() < deadline && !done.is_closed() {
            let _ = done.send(run());
        }
    })?;
    match tokio::time::timeout_at(deadline.into(), result).await {
        Ok(Ok(answer)) => answer,
        // The job ended without a result: it was too late, or it panicked.
        Ok(Err(_)) if Instant::now() < deadline => {
            Err(Refusal::Internal("the request failed inside the host; see its log".into()))
        }
        Ok(Err(_)) | Err(_) => Err(Refusal::Deadline),
    }
}

/// Runs what reads files on a thread that may block. The permit of `turn` lets one caller after the
/// other do so, and each gets a result of its own: a kept one would be stale. Work whose caller
/// has gone keeps its turn until it ends.
pub(crate) async fn one_at_a_time<T: Send + 'static>(
    turn: &Arc<Semaphore>,
    run: impl FnOnce() -> T + Send + 'static,
) -> RequestResult<T> {
    let turn = turn.clone().acquire_owned().await.map_err(Refusal::internal)?;
    let run = move || {
        let _turn = turn;
        run()
    };
    tokio::task::spawn_blocking(run).await.map_err(Refusal::internal)
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

/// Awaits a part of a request until its deadline.
pub(crate) async fn in_time<T>(
    deadline: Instant,
    part: impl Future<Output = RequestResult<T>>,
) -> RequestResult<T> {
    tokio::time::timeout_at(deadline.into(), part).await.unwrap_or(Err(Refusal::Deadline))
}

/// Middleware that measures the time of an answer and counts it.
pub(crate) async fn timed(
    State(metrics): State<Arc<Metrics>>,
    request: Request,
    next: Next,
) -> Response {
    let (start, route) = (Instant::now(), request.uri().path().to_owned());
    let response = next.run(request).await;
    metrics.request(&route, response.status().as_u16(), start.elapsed());
    response
}

/// Middleware that refuses bodies that are compressed: no route decompresses them.
pub(crate) async fn refuse_compressed(request: Request, next: Next) -> Response {
    match request.headers().get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            let why = format!("the body is encoded as {encoding:?}; send it as it is");
            refuse_with(415, "unsupported_encoding", &why)
        }
        _ => next.run(request).await,
    }
}

/// The answer to a method that a route does not have; the header `Allow` names those it has.
pub(crate) async fn wrong_method(request: Request) -> Response {
    let why = format!("this route does not take {}; see the header Allow", request.method());
    refuse_with(405, "wrong_method", &why)
}

/// A request to `POST /v1/events`.
pub(crate) struct SentEvents {
    pub(crate) caller: Caller,
    pub(crate) body: ReceivedBody,
}

/// Stores the events of a request on a worker thread.
pub(crate) async fn store_events(
    workers: &Workers,
    intake: Arc<EventIntake>,
    sent: SentEvents,
    deadline: Instant,
) -> RequestResult<AppendReceipt> {
    let store = move || {
        let request: EventsRequest = parse_json(&sent.body)?;
        if request.clock_ms.is_some() && !sent.caller.may_replay {
            return Err(Refusal::MayNotReplay { caller: sent.caller.name });
        }
        intake.take(&request)
    };
    on_worker(workers, deadline, store).await
}

/// A body in JSON.
pub(crate) fn parse_json<Q: DeserializeOwned>(body: &[u8]) -> RequestResult<Q> {
    serde_json::from_slice(body).map_err(|error| {
        let hint = match body {
            [0x1f, 0x8b, ..] => " (it is compressed with gzip; send it as it is)",
            [0x28, 0xb5, 0x2f, 0xfd, ..] => " (it is compressed with zstd; send it as it is)",
            [0xef, 0xbb, 0xbf, ..] => " (it begins with a byte order mark; leave it out)",
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] | [0, ..] | [_, 0, ..] => {
                " (it is UTF-16 or binary; send UTF-8)"
            }
            _ if std::str::from_utf8(body).is_err() => " (it is not UTF-8)",
            _ => "",
        };
        Refusal::BadRequest(format!("the body: {error}{hint}"))
    })
}

/// The answer of `/readyz` while something is missing; `why` says what it means.
pub(crate) fn not_ready(missing: &[String], why: &str) -> Response {
    let missing_text = missing.iter().map(|what| format!("{what}; ")).collect::<String>();
    let message = missing_text + why;
    let error = RefusalText { code: "not_ready".into(), message };
    let body = json!({ "error": error, "missing": missing });
    (StatusCode::SERVICE_UNAVAILABLE, Json(body)).into_response()
}

/// The answer of `/readyz` if a thread that should live as long as the process has panicked.
pub(crate) fn lost_thread() -> Option<Response> {
    let lost = supervised_thread::lost_threads();
    let missing: Vec<String> = lost.iter().map(|name| format!("thread `{name}`")).collect();
    let why = "it has panicked or given up: see the log, and restart this process";
    (!missing.is_empty()).then(|| not_ready(&missing, why))
}

/// The text of `/metrics`.
pub(crate) fn metrics_text(metrics: &Metrics, set: Option<&ServingSet>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render(set)).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = self.code();
        let mut response = refuse_with(status, code, &self.to_string());
        if let Refusal::Overloaded { retry_after_ms } | Refusal::BodiesFull { retry_after_ms } =
            self
        {
            // The header has whole seconds.
            let seconds = retry_after_ms.div_ceil(1000).max(1);
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        response
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let (status, code) = match self.kind() {
            ErrorKind::Invalid => (400, "bad_request"),
            ErrorKind::Refused => (409, "refused"),
            ErrorKind::Unfit => (422, "unfit"),
            ErrorKind::Unavailable => (503, "busy"),
            ErrorKind::Internal => (500, "internal"),
        };
        refuse_with(status, code, &self.to_string())
    }
}

pub(crate) fn refuse_with(status: u16, code: &str, message: &str) -> Response {
    let body = RefusalBody { error: RefusalText { code: code.into(), message: message.into() } };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(body)).into_response()
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    };

    use super::*;
    use crate::threads::ThreadGroup;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn probes_look_at_files_one_after_the_other_and_each_for_itself() {
        let (turn, looks) = (Arc::new(Semaphore::new(1)), Arc::new(AtomicUsize::new(0)));
        let (begun, begins) = channel();
        let (go_on, waits) = channel::<()>();
        let first = tokio::spawn({
            let turn = turn.clone();
            async move {
                let look = move || {
                    begun.send(()).unwrap();
                    waits.recv().unwrap();
                };
                one_at_a_time(&turn, look).await
            }
        });
        tokio::task::spawn_blocking(move || begins.recv().unwrap()).await.unwrap();
        // Its probe goes away while it looks, and many others come.
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        let probe = || {
            let (turn, looks) = (turn.clone(), looks.clone());
            tokio::spawn(async move {
                let look = move || looks.fetch_add(1, Ordering::SeqCst);
                one_at_a_time(&turn, look).await.unwrap()
            })
        };
        let others: Vec<_> = (0..200).map(|_| probe()).collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(looks.load(Ordering::SeqCst), 0, "they wait for the first look to end");
        go_on.send(()).unwrap();
        let mut seen = Vec::new();
        for other in others {
            seen.push(other.await.unwrap());
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..200).collect::<Vec<_>>(), "each has a look of its own");
    }

    #[tokio::test]
    async fn a_daemon_that_lost_a_thread_is_not_ready_and_names_it() {
        let threads = ThreadGroup::default();
        threads.spawn("lost-in-a-test", |_| panic!("as a bug would")).unwrap();
        threads.stop();
        let answer = lost_thread().expect("the panic is known");
        assert_eq!(answer.status(), 503);
        let body = axum::body::to_bytes(answer.into_body(), 1 << 16).await.unwrap();
        let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(body["missing"], json!(["thread `lost-in-a-test`"]));
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("panicked") && message.contains("restart"), "{message}");
    }
}
