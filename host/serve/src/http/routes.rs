//! The routes and their handlers. A rank request passes three stages, each with threads of its own:
//! features, the FM, the expert. No thread waits for another stage.

use std::{sync::Arc, time::Instant};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::State,
    http::{HeaderMap, header},
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use hypercast_config::DaemonTier;
use hypercast_stream::events::AppendReceipt;

use crate::{
    fm::{
        FmRequest,
        remote::{decode_examples, encode_output},
    },
    http::{
        admin,
        auth::{self, Caller, GuardedRoutes},
        bodies::ReservedMemory,
        live_page, reload,
        respond::{
            SentEvents, in_time, lost_thread, metrics_text, not_ready, on_worker, one_at_a_time,
            parse_json, refuse_compressed, refuse_with, store_events, time_left, timed,
            wrong_method,
        },
        server::{AppState, fm_config},
    },
    request::{
        api::{EventsAnswer, FM_VERSION_HEADER, RankRequest, Refusal, RequestResult},
        service::{Fetched, RankingService},
    },
    threads::lock,
    versions::{
        serving_set::{ServedFm, ServingSet},
        shadow::ShadowRequest,
    },
};

/// The routes of a process.
pub(crate) fn of(app: Arc<AppState>) -> Router {
    let (access, timed) = (&app.reloader.access, from_fn_with_state(app.metrics.clone(), timed));
    let routes = match app.reloader.origin.tier {
        DaemonTier::All | DaemonTier::Expert | DaemonTier::Ingest => {
            let for_callers = Router::new()
                .route("/v1/live", get(live))
                .route("/v1/rank", post(rank).route_layer(timed.clone()))
                .route("/v1/events", post(events).route_layer(timed))
                .route_layer(from_fn(refuse_compressed));
            let for_operators =
                Router::new().route("/reload", post(reload::route)).merge(admin::routes());
            Router::new()
                .route(
                    "/",
                    get(|| page("text/html; charset=utf-8", include_str!("page/index.html"))),
                )
                .route("/page.js", get(|| page("text/javascript", include_str!("page/page.js"))))
                .route("/page.css", get(|| page("text/css", include_str!("page/page.css"))))
                .merge(auth::guard(for_callers, access, GuardedRoutes::Callers))
                .nest("/v1/admin", auth::guard(for_operators, access, GuardedRoutes::Admin))
        }
        DaemonTier::FmServing | DaemonTier::FmLogging => {
            let for_tiers = Router::new()
                .route("/v1/embed", post(embed).route_layer(timed))
                .route("/v1/fm", get(manifest));
            auth::guard(for_tiers, access, GuardedRoutes::Callers)
        }
    };
    routes
        .merge(probe_routes())
        .method_not_allowed_fallback(wrong_method)
        .fallback(|| async {
            refuse_with(404, "not_found", "no such route; README.md lists the routes")
        })
        .with_state(app)
}

/// The routes of `server.probe_listen`.
pub(crate) fn probes(app: Arc<AppState>) -> Router {
    probe_routes().with_state(app)
}

fn probe_routes() -> Router<Arc<AppState>> {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/readyz/serving", get(serving))
        .route("/metrics", get(metrics))
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

/// A rank request whose body was parsed, with the part of the memory for bodies that it takes until
/// it is answered.
struct ParsedRank {
    request: RankRequest,
    fetched: Arc<Fetched>,
    reserved: Arc<ReservedMemory>,
}

async fn rank(
    State(app): State<Arc<AppState>>,
    headers: HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let start = Instant::now();
    let service = service(&app)?;
    let left = time_left(&headers, app.reloader.settings.now().server.deadline_ms)?;
    let deadline = start + left;
    // Checked before the body is read, so that a refusal costs nothing.
    let mut permit = app.admission.enter(left)?;
    let body = app.bodies.read(body, app.reloader.settings.now().server.max_body_bytes);
    let body = in_time(deadline, body).await?;
    permit.begin();
    let of_fetch = service.clone();
    // A parsed body may be several times as large as its bytes, so no more are parsed at a time
    // than there are threads.
    let fetch = move || {
        let request: RankRequest = parse_json(&body)?;
        let fetched = of_fetch.fetch(&request)?;
        let reserved = Arc::new(body.into_reserved());
        Ok(ParsedRank { request, fetched: Arc::new(fetched), reserved })
    };
    let ParsedRank { request, fetched, reserved } =
        on_worker(&app.workers, deadline, fetch).await?;
    let asked = Instant::now();
    let (examples, _reserved) = (fetched.core.clone(), Some(reserved.clone()));
    let asks = FmRequest { examples, deadline, _reserved };
    let output = fetched.fm().tier.infer(asks).await.map(Arc::new);
    let took = asked.elapsed();
    if let Err(
        refusal @ (Refusal::Overloaded { .. }
        | Refusal::Deadline
        | Refusal::FileLost(_)
        | Refusal::Internal(_)),
    ) = output
    {
        return Err(refusal);
    }
    let idle = service.clone();
    let seen = ShadowRequest { fetched: fetched.clone(), fm: output.as_ref().ok().cloned() };
    let run = move || {
        let _reserved = reserved;
        service.rank(&request, &fetched, output, took)
    };
    let answer = on_worker(&app.workers, deadline, run).await?;
    // Work that need not delay the answer.
    app.workers.submit_later(move || idle.after(seen));
    Ok(Json(answer).into_response())
}

async fn events(
    State(app): State<Arc<AppState>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let (service, settings) = (service(&app)?, app.reloader.settings.now());
    let deadline = Instant::now() + time_left(&headers, settings.server.deadline_ms)?;
    let body = app.bodies.read(body, settings.server.max_body_bytes);
    let sent = SentEvents { caller, body: in_time(deadline, body).await? };
    let intake = service.streams.intake.clone();
    let AppendReceipt { accepted, repeated, end } =
        store_events(&app.intake, intake, sent, deadline).await?;
    // The events are durable now, so the answer is a success even if the joiner is not in time.
    let applied = service.streams.wait_applied(end, deadline).await;
    Ok(Json(EventsAnswer { accepted, repeated, applied }).into_response())
}

/// Answers the FM's output to another process.
async fn embed(
    State(app): State<Arc<AppState>>,
    headers: HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let start = Instant::now();
    let loaded = app.loaded()?;
    let config = app.reloader.settings.now();
    let left = time_left(&headers, config.server.deadline_ms)?;
    let mut permit = app.admission.enter(left)?;
    let own = fm_config(&config, app.reloader.origin.tier);
    let body = in_time(start + left, app.bodies.read(body, own.max_body_bytes)).await?;
    permit.begin();
    let upgrade = loaded.upgrade.clone();
    let decode = move || {
        let mut examples = decode_examples(&body)?;
        if let Some(upgrade) = upgrade {
            examples.iter_mut().for_each(|example| upgrade.example(example));
        }
        Ok((examples, body.into_reserved()))
    };
    let (examples, reserved) = on_worker(&app.workers, start + left, decode).await?;
    let set = loaded.models.set();
    let fm = wanted(&set, &headers)?;
    let (examples, _reserved) = (examples.into(), Some(Arc::new(reserved)));
    let asks = FmRequest { examples, deadline: start + left, _reserved };
    let output = fm.tier.infer(asks).await?;
    let (width, format) = (fm.manifest().config.tae_width(), own.tae);
    let answer = encode_output(output, width, format)?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], answer).into_response())
}

async fn manifest(State(app): State<Arc<AppState>>, headers: HeaderMap) -> RequestResult<Response> {
    Ok(Json(wanted(&app.loaded()?.models.set(), &headers)?.manifest()).into_response())
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

/// `GET /readyz`: whether every version that should serve is loaded and its files are whole, every
/// thread runs, and the streams bring few records that cannot be used.
///
/// A process that cannot load a promotion is not ready, although what it served before goes on. A
/// load balancer that must keep replicas through a bad promotion should use `/readyz/serving`.
async fn readyz(State(app): State<Arc<AppState>>) -> RequestResult<Response> {
    if let Some(lost) = lost_thread() {
        return Ok(lost);
    }
    let models = app.loaded()?.models.clone();
    let (missing, problem) = (lock(&models.missing).clone(), models.problem());
    let set = models.set();
    // It looks at files, and reads those that were cut and are whole again.
    let lost = one_at_a_time(&app.looks, move || set.lost_files()).await?;
    if !lost.is_empty() {
        return Err(Refusal::FileLost(lost.join("; ")));
    }
    if let Some(problem) = lock(&app.growth_problem).clone() {
        return Ok(not_ready(&missing, &problem));
    }
    if let Some(warning) = app.metrics.set_aside_warning().filter(|_| missing.is_empty()) {
        return Ok(not_ready(&missing, &warning));
    }
    if missing.is_empty() {
        // A shadow or standby version that fails to load is reported; it does not affect readiness.
        let but = problem.map(|problem| format!(", but some versions are not loaded: {problem}"));
        return Ok(format!("ready{}\n", but.unwrap_or_default()).into_response());
    }
    let problem = problem.as_deref().unwrap_or("it is being loaded");
    Ok(not_ready(&missing, &format!("what served before goes on. Why: {problem}")))
}

/// `GET /readyz/serving`: whether requests are answered, by whatever versions.
async fn serving(State(app): State<Arc<AppState>>) -> RequestResult<&'static str> {
    app.loaded().map(|_| "serving\n")
}

async fn metrics(State(app): State<Arc<AppState>>) -> Response {
    let loaded = app.loaded().ok();
    let set = loaded.as_ref().map(|loaded| loaded.models.set());
    if let Some(set) = &set {
        app.metrics.history_cache(set.cache_counts());
    }
    if let Some(service) = loaded.as_ref().and_then(|loaded| loaded.service.as_ref()) {
        app.metrics.quality(&service.predictions, &service.converter.schema);
    }
    metrics_text(&app.metrics, set.as_deref())
}

/// The data of the page at `/`.
async fn live(State(app): State<Arc<AppState>>) -> RequestResult<Response> {
    let service = service(&app)?;
    Ok(Json(live_page::report(&service, &app.metrics)).into_response())
}

fn service(app: &AppState) -> RequestResult<Arc<RankingService>> {
    let service = app.loaded()?.service.clone();
    Ok(service.expect("the routes of a tier without a service do not ask for one"))
}
