//! The tier that receives events and does nothing else. It has no models and no features, so it
//! starts at once and needs little memory.

use std::{sync::Arc, time::Instant};

use axum::{
    Router,
    body::Body,
    extract::State,
    http::{HeaderMap, StatusCode},
    response::Response,
    routing::{get, post},
};
use hypercast_config::Config;
use hypercast_data::schema::Schema;
use hypercast_stream::events::AppendReceipt;

use crate::{
    error::Result,
    http::{
        auth,
        listen::BoundListener,
        reload::{self, Reloader, Settings},
        respond::{json, metrics_text, refuse_with, store_events, time_left, timed},
    },
    metrics::Metrics,
    request::{
        api::{EventsAnswer, EventsRequest, RequestResult},
        events::EventIntake,
        workers::{PoolSize, Workers},
    },
    threads::ThreadGroup,
};

/// Threads that wait for the disk.
const THREADS: usize = 4;

struct IngestState {
    settings: Arc<Settings>,
    reloader: Reloader,
    intake: Arc<EventIntake>,
    workers: Workers,
    metrics: Arc<Metrics>,
}

/// What the tier needs besides its listener.
pub(crate) struct IngestContext {
    /// The configuration of the start.
    pub(crate) config: Config,
    /// The part of it that a reload changes.
    pub(crate) settings: Arc<Settings>,
    /// Counts requests and events.
    pub(crate) metrics: Arc<Metrics>,
    /// Reads the configuration again.
    pub(crate) reloader: Reloader,
}

/// Receives events until `stop` resolves, then finishes what was accepted.
///
/// # Errors
/// The data set has no schema, or the stream engine cannot be reached or written to.
pub(crate) async fn serve(
    bound: BoundListener,
    context: IngestContext,
    stop: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(&str) + Send + 'static,
) -> Result<()> {
    let IngestContext { config, settings, metrics, reloader } = context;
    let schema = Arc::new(Schema::load(&config.paths.dataset.join("schema.toml"))?);
    let engine = hypercast_stream::streams::open(&config.engine)?;
    let intake = Arc::new(EventIntake::new(engine, schema, &config, metrics.clone()));
    intake.open()?;
    let size = PoolSize { threads: THREADS, queue: config.server.queue };
    let workers = Workers::start(size)?;
    let (threads, ticks) = (ThreadGroup::default(), intake.clone());
    threads.spawn("ticks", move |stop| ticks.tick(stop))?;
    let app = Arc::new(IngestState { settings, reloader, intake, workers, metrics });
    let own = Arc::downgrade(&app);
    // This tier has no experts to load.
    reload::at_signals(move || Some(own.upgrade()?.reloader.reload(|_| Ok(false))))?;
    ready(&bound.url());
    bound.serve(routes(app), stop).await;
    threads.stop();
    Ok(())
}

fn routes(app: Arc<IngestState>) -> Router {
    let taking = Router::new().route("/v1/events", post(events));
    auth::guard_callers(taking, &app.reloader.access)
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(|| async { "ready\n" }))
        .route("/readyz/serving", get(|| async { "serving\n" }))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            refuse_with(404, "not_found", "this tier only receives events: POST /v1/events")
        })
        .with_state(app)
}

async fn metrics(State(app): State<Arc<IngestState>>) -> Response {
    metrics_text(&app.metrics)
}

async fn events(State(app): State<Arc<IngestState>>, headers: HeaderMap, body: Body) -> Response {
    timed(&app.metrics, "/v1/events", store(&app, &headers, body)).await
}

async fn store(app: &IngestState, headers: &HeaderMap, body: Body) -> RequestResult<Response> {
    let server = &app.settings.now().server;
    let deadline = Instant::now() + time_left(headers, server.deadline_ms)?;
    let intake = app.intake.clone();
    let store = move |request: &EventsRequest| intake.take(request);
    let AppendReceipt { accepted, repeated, .. } =
        store_events(&app.workers, body, server.max_body_bytes, deadline, store).await?;
    Ok(json(StatusCode::OK, &EventsAnswer { accepted, repeated, applied: false }))
}
