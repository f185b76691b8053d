//! The HTTP side: routes, bodies, statuses. What a route means is
//! [`super::service`]'s; what it looks like is [`super::api`]'s.
//!
//! The server answers `/healthz` from its first moment and everything else
//! once the models are loaded.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpListener, sync::oneshot};

use super::{
    api::{EventsAnswer, Refusal, RefusalBody, RefusalText},
    metrics::Metrics,
    service::Service,
    workers::{PoolSize, Workers},
};
use crate::{
    config::Config,
    error::{Error, Result},
};

/// What handlers share.
struct App {
    config: Config,
    service: OnceLock<Arc<Service>>,
    workers: Workers,
    metrics: Arc<Metrics>,
}

/// Binds, loads, serves until `stop` resolves, then finishes what was accepted.
/// `ready` is told the address once models are loaded.
///
/// # Errors
/// An address that cannot be bound; whatever loading says.
pub async fn serve(
    config: Config,
    stop: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(std::net::SocketAddr) + Send + 'static,
) -> Result<()> {
    let listen = config.server.listen.clone();
    let cannot = |error: std::io::Error| {
        Error::Invalid(format!("cannot listen on {listen:?} (server.listen): {error}"))
    };
    let listener = TcpListener::bind(&listen).await.map_err(cannot)?;
    let address = listener.local_addr().map_err(cannot)?;
    let size = PoolSize { threads: config.server.threads, queue: config.server.queue };
    let workers = Workers::start(size)
        .map_err(|error| Error::Invalid(format!("cannot start threads: {error}")))?;
    let metrics = Arc::new(Metrics::new());
    let app = Arc::new(App { config, service: OnceLock::new(), workers, metrics });
    let (failed, failure) = oneshot::channel();
    let loading = app.clone();
    std::thread::spawn(move || match Service::load(&loading.config, loading.metrics.clone()) {
        Ok(service) => {
            let _ = loading.service.set(Arc::new(service));
            ready(address);
        }
        // The receiver is gone only if the server has stopped already.
        Err(error) => drop(failed.send(error)),
    });
    let (halt, halted) = oneshot::channel::<()>();
    let served = axum::serve(listener, routes(app)).with_graceful_shutdown(async {
        // An error means that the sender is gone, which is a reason to stop too.
        let _ = halted.await;
    });
    let server = tokio::spawn(served.into_future());
    let outcome = tokio::select! {
        () = stop => Ok(()),
        Ok(error) = failure => Err(error),
    };
    let _ = halt.send(());
    match server.await {
        Ok(Ok(())) => outcome,
        Ok(Err(error)) => outcome.and(Err(Error::Invalid(format!("the server failed: {error}")))),
        Err(error) => outcome.and(Err(Error::Invalid(format!("the server failed: {error}")))),
    }
}

fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/rank", post(rank))
        .route("/v1/events", post(events))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            refuse_with(404, "not_found", "no such route; see README.md for those there are")
        })
        .with_state(app)
}

async fn rank(State(app): State<Arc<App>>, body: Body) -> Response {
    let run = |service: &Service, request| service.rank(&request);
    answer(app, "/v1/rank", body, run).await
}

async fn events(State(app): State<Arc<App>>, body: Body) -> Response {
    let run = |service: &Service, request| {
        service.events(&request).map(|accepted| EventsAnswer { accepted })
    };
    answer(app, "/v1/events", body, run).await
}

async fn readyz(State(app): State<Arc<App>>) -> Response {
    match app.service.get() {
        Some(_) => "ready\n".into_response(),
        None => refuse(&Refusal::Starting),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.render()).into_response()
}

/// Body → request → worker → answer, timed and counted.
async fn answer<Q, A>(
    app: Arc<App>,
    route: &'static str,
    body: Body,
    run: impl FnOnce(&Service, Q) -> std::result::Result<A, Refusal> + Send + 'static,
) -> Response
where
    Q: DeserializeOwned + Send + 'static,
    A: Serialize + Send + 'static,
{
    let start = Instant::now();
    let response = match run_on_worker(&app, body, run).await {
        Ok(answer) => json(StatusCode::OK, &answer),
        Err(refusal) => refuse(&refusal),
    };
    app.metrics.request(route, response.status().as_u16(), start.elapsed());
    response
}

async fn run_on_worker<Q, A>(
    app: &Arc<App>,
    body: Body,
    run: impl FnOnce(&Service, Q) -> std::result::Result<A, Refusal> + Send + 'static,
) -> std::result::Result<A, Refusal>
where
    Q: DeserializeOwned + Send + 'static,
    A: Send + 'static,
{
    let service = app.service.get().ok_or(Refusal::Starting)?.clone();
    let most = app.config.server.max_body_bytes;
    let bytes = axum::body::to_bytes(body, most).await.map_err(|_| {
        Refusal::BadRequest(format!(
            "the body is over {most} bytes (server.max_body_bytes), or broke off"
        ))
    })?;
    let request: Q = serde_json::from_slice(&bytes)
        .map_err(|error| Refusal::BadRequest(format!("the body: {error}")))?;
    let deadline_ms = app.config.server.deadline_ms;
    let deadline = Instant::now() + Duration::from_millis(deadline_ms);
    let (done, result) = oneshot::channel();
    app.workers
        .submit(move || {
            // Nobody waits for an answer after the deadline; a late one only delays others.
            if Instant::now() < deadline {
                let _ = done.send(run(&service, request));
                service.between_requests();
            }
        })
        .map_err(|_| Refusal::Overloaded)?;
    match tokio::time::timeout_at(deadline.into(), result).await {
        Ok(Ok(answer)) => answer,
        // The job went without an answer: it was too late, or it panicked.
        Ok(Err(_)) if Instant::now() < deadline => {
            Err(Refusal::Internal("the request failed inside the host; see its log".into()))
        }
        Ok(Err(_)) | Err(_) => Err(Refusal::Deadline(deadline_ms)),
    }
}

fn refuse(refusal: &Refusal) -> Response {
    let (status, code) = refusal.code();
    refuse_with(status, code, &refusal.to_string())
}

fn refuse_with(status: u16, code: &str, message: &str) -> Response {
    let body = RefusalBody { error: RefusalText { code: code.into(), message: message.into() } };
    json(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &body)
}

fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
