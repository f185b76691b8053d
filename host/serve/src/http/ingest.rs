//! The tier that receives events and does nothing else. It has no models and no features, so it
//! starts at once and needs little memory.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Instant,
};

use axum::{
    Extension, Json, Router,
    body::Body,
    extract::State,
    http::HeaderMap,
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use hypercast_config::Config;
use hypercast_data::{
    dataset::content,
    schema::{Schema, SchemaWatch},
};
use hypercast_stream::{events::AppendReceipt, streams};

use crate::{
    error::Result,
    http::{
        auth::{self, Caller, GuardedRoutes},
        bodies::BodyBudget,
        growth,
        listen::{Listeners, ProbeServer},
        reload::{self, ReloadedModels, Reloader},
        respond::{
            SentEvents, in_time, lost_thread, metrics_text, refuse_compressed, refuse_with,
            store_events, time_left, timed, wrong_method,
        },
    },
    metrics::Metrics,
    request::{
        api::{EventsAnswer, RequestResult},
        caller_ids::CallerIds,
        convert::Converter,
        events::EventIntake,
        workers::Workers,
    },
    threads::{Current, ThreadGroup, lock},
};

/// Threads that wait for the disk.
const THREADS: usize = 4;

struct IngestState {
    reloader: Reloader,
    /// Replaced when the schema has grown.
    intake: Current<EventIntake>,
    watch: Mutex<SchemaWatch>,
    workers: Workers,
    bodies: BodyBudget,
    metrics: Arc<Metrics>,
}

impl IngestState {
    /// Takes events under a schema that has grown from the next request on; returns whether it had.
    ///
    /// # Errors
    /// The schema, or the width of the data set's content vectors, cannot be read.
    fn take_growth_over(&self) -> Result<bool> {
        let mut watch = lock(&self.watch);
        if !watch.has_grown() {
            return Ok(false);
        }
        let config = self.reloader.settings.now();
        let path = schema_path(&config);
        let schema = Arc::new(Schema::load(&path)?);
        let width = content::width_in(&config.paths.dataset)?;
        self.intake.replace(self.intake.now().under(schema.clone(), width));
        *watch = SchemaWatch::new(path, schema);
        tracing::info!("the schema that has grown is used from the next request on");
        Ok(true)
    }
}

fn schema_path(config: &Config) -> PathBuf {
    config.paths.dataset.join("schema.toml")
}

/// Receives events until `stop` resolves, then finishes what was accepted.
///
/// # Errors
/// The data set has no schema, or the stream engine cannot be reached or written to.
pub(crate) async fn serve(
    listeners: Listeners,
    metrics: Arc<Metrics>,
    reloader: Reloader,
    stop: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(&str) + Send + 'static,
) -> Result<()> {
    let config = reloader.settings.now();
    let schema = Arc::new(Schema::load(&schema_path(&config))?);
    let watch = Mutex::new(SchemaWatch::new(schema_path(&config), schema.clone()));
    let threads = ThreadGroup::default();
    let engine = streams::open_with_shutdown(&config.engine, &threads.stop)?;
    let ids = CallerIds::open(&config, &config.paths.dataset, &schema, "ingest", &metrics)?;
    let width = content::width_in(&config.paths.dataset)?;
    let converter = Converter::new(schema).with_content(Some(width));
    let intake = EventIntake::new(engine, converter, ids, &config, metrics.clone());
    intake.writer.open()?;
    let workers = Workers::start(THREADS, config.server.queue)?;
    let ticks = intake.writer.clone();
    threads.spawn("ticks", move |stop| ticks.tick(stop))?;
    let intake = Current::new(intake);
    let bodies = BodyBudget::new(config.inflight_body_bytes(), &metrics);
    let app = Arc::new(IngestState { reloader, intake, watch, workers, bodies, metrics });
    let own = Arc::downgrade(&app);
    reload::at_signals(move || {
        let app = own.upgrade()?;
        // This tier has no experts to load.
        let models =
            |_: &Config| Ok(ReloadedModels { schema: app.take_growth_over()?, experts: false });
        Some(app.reloader.reload(models))
    })?;
    let own = Arc::downgrade(&app);
    growth::follow(move || Some(own.upgrade()?.take_growth_over()));
    let Listeners { requests, probes } = listeners;
    let probes = ProbeServer::start(probes, probe_routes().with_state(app.clone()));
    ready(&requests.url());
    requests.serve(routes(app), stop).await;
    threads.stop();
    probes.stop().await;
    Ok(())
}

fn routes(app: Arc<IngestState>) -> Router {
    let timed = from_fn_with_state(app.metrics.clone(), timed);
    let taking = Router::new()
        .route("/v1/events", post(events).route_layer(timed))
        .route_layer(from_fn(refuse_compressed));
    auth::guard(taking, &app.reloader.access, GuardedRoutes::Callers)
        .merge(probe_routes())
        .method_not_allowed_fallback(wrong_method)
        .fallback(|| async {
            refuse_with(404, "not_found", "this tier only receives events: POST /v1/events")
        })
        .with_state(app)
}

fn probe_routes() -> Router<Arc<IngestState>> {
    Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/readyz/serving", get(|| async { "serving\n" }))
        .route("/metrics", get(metrics))
}

async fn readyz() -> Response {
    lost_thread().unwrap_or_else(|| "ready\n".into_response())
}

async fn metrics(State(app): State<Arc<IngestState>>) -> Response {
    metrics_text(&app.metrics, None)
}

async fn events(
    State(app): State<Arc<IngestState>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> RequestResult<Response> {
    let server = &app.reloader.settings.now().server;
    let deadline = Instant::now() + time_left(&headers, server.deadline_ms)?;
    let body = in_time(deadline, app.bodies.read(body, server.max_body_bytes)).await?;
    let sent = SentEvents { caller, body };
    let AppendReceipt { accepted, repeated, .. } =
        store_events(&app.workers, app.intake.now(), sent, deadline).await?;
    Ok(Json(EventsAnswer { accepted, repeated, applied: false }).into_response())
}
