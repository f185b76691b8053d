//! The routes and their handlers. A rank request passes three stages, each with threads of its own:
//! features, the FM, the expert. No thread waits for another stage.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hypercast_config::DaemonTier;
use hypercast_stream::events::AppendReceipt;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    fm::remote::{decode_examples, encode_output},
    http::{
        admin, auth, live_page, reload,
        respond::{
            bytes, json, metrics_text, on_worker, parse_json, refuse, refuse_with, store_events,
            time_left, timed,
        },
        server::{AppState, fm_config},
    },
    request::{
        api::{
            EventsAnswer, EventsRequest, FM_VERSION_HEADER, RankRequest, Refusal, RefusalText,
            RequestResult,
        },
        service::{FmAnswer, RankingService},
    },
    versions::{
        serving_set::{ServedFm, ServingSet},
        shadow::ShadowRequest,
    },
};

/// The routes of a process.
pub(crate) fn of(app: Arc<AppState>) -> Router {
    let routes = match app.tier {
        DaemonTier::All | DaemonTier::Expert | DaemonTier::Ingest => Router::new()
            .route("/", get(|| page("text/html; charset=utf-8", include_str!("page/index.html"))))
            .route("/page.js", get(|| page("text/javascript", include_str!("page/page.js"))))
            .route("/page.css", get(|| page("text/css", include_str!("page/page.css"))))
            .merge(auth::guard_callers(for_callers(), app.access()))
            .nest("/v1/admin", auth::guard(for_operators(), app.access())),
        DaemonTier::FmServing | DaemonTier::FmLogging => {
            auth::guard_callers(for_tiers(), app.access())
        }
    };
    routes
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/readyz/serving", get(serving))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            refuse_with(404, "not_found", "no such route; README.md lists the routes")
        })
        .with_state(app)
}

fn for_callers() -> Router<Arc<AppState>> {
    Router::new()
        .route("/v1/live", get(live))
        .route("/v1/rank", post(rank))
        .route("/v1/events", post(events))
}

fn for_tiers() -> Router<Arc<AppState>> {
    Router::new().route("/v1/embed", post(embed)).route("/v1/fm", get(manifest))
}

/// Routes under `/v1/admin`.
fn for_operators() -> Router<Arc<AppState>> {
    Router::new().route("/reload", post(reload::route)).merge(admin::routes())
}

/// The page may load only this daemon's files and call only this daemon.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; \
     connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page at `/` and its parts.
async fn page(content_type: &'static str, text: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CONTENT_SECURITY_POLICY, PAGE_POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text).into_response()
}

async fn rank(State(app): State<Arc<AppState>>, headers: HeaderMap, body: Body) -> Response {
    timed(&app.metrics, "/v1/rank", rank_in_time(&app, &headers, body)).await
}

async fn events(State(app): State<Arc<AppState>>, headers: HeaderMap, body: Body) -> Response {
    timed(&app.metrics, "/v1/events", events_in_time(&app, &headers, body)).await
}

/// Answers the FM's output to another process.
async fn embed(State(app): State<Arc<AppState>>, headers: HeaderMap, body: Body) -> Response {
    timed(&app.metrics, "/v1/embed", embed_in_time(&app, &headers, body)).await
}

async fn rank_in_time(
    app: &Arc<AppState>,
    headers: &HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let start = Instant::now();
    let service = service(app)?;
    let left = time_left(headers, app.settings.now().server.deadline_ms)?;
    let deadline = start + left;
    // Checked before the body is read, so that a refusal costs nothing.
    let mut permit = app.admission.enter(left)?;
    let request: Arc<RankRequest> = Arc::new(in_time(deadline, body_of(app, body)).await?);
    permit.begin();
    let (of_fetch, own) = (service.clone(), request.clone());
    let fetched = Arc::new(on_worker(app, deadline, move || of_fetch.fetch(&own)).await?);
    let asked = Instant::now();
    let output = fetched.fm().tier.infer(fetched.example.clone(), deadline).await.map(Arc::new);
    let took = asked.elapsed();
    if let Err(refusal @ (Refusal::Overloaded { .. } | Refusal::Deadline | Refusal::Internal(_))) =
        output
    {
        return Err(refusal);
    }
    let idle = service.clone();
    let seen = ShadowRequest { fetched: fetched.clone(), fm: output.as_ref().ok().cloned() };
    let run = move || service.rank(&request, &fetched, FmAnswer { output, took });
    let answer = on_worker(app, deadline, run).await?;
    // Work that need not delay the answer; skipped if the queue is full.
    let _ = app.workers.submit(move || idle.after(seen));
    Ok(json(StatusCode::OK, &answer))
}

async fn events_in_time(
    app: &Arc<AppState>,
    headers: &HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let service = service(app)?;
    let server = &app.settings.now().server;
    let deadline = Instant::now() + time_left(headers, server.deadline_ms)?;
    let streams = service.streams().clone();
    let store = move |request: &EventsRequest| streams.take(request);
    let AppendReceipt { accepted, repeated, end } =
        store_events(&app.intake, body, server.max_body_bytes, deadline, store).await?;
    // The events are durable now, so the answer is a success even if the joiner is not in time.
    let applied = service.streams().wait_applied(end, deadline).await;
    Ok(json(StatusCode::OK, &EventsAnswer { accepted, repeated, applied }))
}

async fn embed_in_time(
    app: &Arc<AppState>,
    headers: &HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let start = Instant::now();
    let loaded = app.loaded()?;
    let config = app.settings.now();
    let left = time_left(headers, config.server.deadline_ms)?;
    let mut permit = app.admission.enter(left)?;
    let own = fm_config(&config, app.tier);
    let body = in_time(start + left, bytes(body, own.max_body_bytes)).await?;
    permit.begin();
    let examples = on_worker(app, start + left, move || decode_examples(&body)).await?;
    let set = loaded.models.set();
    let fm = wanted(&set, headers)?;
    let output = fm.tier.infer(examples.into(), start + left).await?;
    let (width, format) = (fm.manifest().config.tae_width(), own.tae);
    let answer = encode_output(output, width, format)
        .map_err(|error| Refusal::Internal(error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], answer).into_response())
}

async fn manifest(State(app): State<Arc<AppState>>, headers: HeaderMap) -> Response {
    let answer = app.loaded().and_then(|loaded| {
        Ok(json(StatusCode::OK, wanted(&loaded.models.set(), &headers)?.manifest()))
    });
    answer.unwrap_or_else(|refusal| refuse(&refusal))
}

/// The FM version that the caller asks for.
fn wanted<'a>(set: &'a ServingSet, headers: &HeaderMap) -> RequestResult<&'a ServedFm> {
    let Some(given) = headers.get(FM_VERSION_HEADER) else { return Ok(set.default_fm()) };
    let given = given.to_str().unwrap_or_default();
    set.fm(given).ok_or_else(|| Refusal::NoVersion {
        given: given.to_owned(),
        known: set.fms().map(|fm| fm.version().to_owned()).collect(),
    })
}

/// `GET /readyz`: whether every version that should serve is loaded.
///
/// A process that cannot load a promotion is not ready, although what it served before goes on. A
/// load balancer that must keep replicas through a bad promotion should use `/readyz/serving`.
async fn readyz(State(app): State<Arc<AppState>>) -> Response {
    let models = match app.loaded() {
        Ok(loaded) => &loaded.models,
        Err(refusal) => return refuse(&refusal),
    };
    let (missing, problem) = (models.missing(), models.problem());
    if missing.is_empty() {
        // A shadow or standby version that fails to load is reported; it does not affect readiness.
        return match problem {
            None => "ready\n".into_response(),
            Some(problem) => {
                format!("ready, but some versions are not loaded: {problem}\n").into_response()
            }
        };
    }
    let message = format!(
        "not loaded: {}; what served before goes on. Why: {}",
        missing.join(", "),
        problem.as_deref().unwrap_or("it is being loaded")
    );
    let error = RefusalText { code: "not_ready".into(), message };
    json(StatusCode::SERVICE_UNAVAILABLE, &NotReady { error, missing })
}

/// A refusal that lists what is missing.
#[derive(Serialize)]
struct NotReady {
    error: RefusalText,
    missing: Vec<String>,
}

/// `GET /readyz/serving`: whether requests are answered, by whatever versions.
async fn serving(State(app): State<Arc<AppState>>) -> Response {
    match app.loaded() {
        Ok(_) => "serving\n".into_response(),
        Err(refusal) => refuse(&refusal),
    }
}

async fn metrics(State(app): State<Arc<AppState>>) -> Response {
    if let Some(loaded) = app.loaded.get() {
        app.metrics.history_cache(loaded.models.set().cache_counts());
    }
    if let Some(service) = app.loaded.get().and_then(|loaded| loaded.service.as_ref()) {
        live_page::gauges(service, &app.metrics);
    }
    metrics_text(&app.metrics)
}

/// The data of the page at `/`.
async fn live(State(app): State<Arc<AppState>>) -> Response {
    match service(&app) {
        Ok(service) => json(StatusCode::OK, &live_page::report(&service, &app.metrics)),
        Err(refusal) => refuse(&refusal),
    }
}

fn service(app: &AppState) -> RequestResult<Arc<RankingService>> {
    let service = app.loaded()?.service.clone();
    Ok(service.expect("the routes of a tier without a service do not ask for one"))
}

/// Awaits a body until its request's deadline, because it occupies a slot that others may need.
async fn in_time<B>(
    deadline: Instant,
    body: impl Future<Output = RequestResult<B>>,
) -> RequestResult<B> {
    tokio::time::timeout_at(deadline.into(), body).await.unwrap_or(Err(Refusal::Deadline))
}

async fn body_of<Q: DeserializeOwned>(app: &AppState, body: Body) -> RequestResult<Q> {
    let bytes = bytes(body, app.settings.now().server.max_body_bytes).await?;
    parse_json(&bytes)
}
