//! The HTTP side: a process' tiers behind routes, statuses, deadlines. What a
//! route does is in [`super::routes`]; what it looks like is [`super::api`]'s.
//!
//! The server answers `/healthz` from its first moment and everything else
//! once the models are loaded.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use axum::{
    body::Bytes,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
};

use super::{
    admission::Admission,
    api::{DEADLINE_HEADER, Refusal, RefusalBody, RefusalText},
    auth::Access,
    follow::{Begun, Following},
    ingest,
    listen::{self, Bound},
    loader::Loader,
    metrics::Metrics,
    reload::{self, Origin, Outcome, Reloader},
    rollouts, routes,
    service::Service,
    set::Models,
    settings::Settings,
    workers::{PoolSize, Workers},
};
use crate::error::{CommonErrors as _, Error, Result};
use crate::rollout::Rollouts;
use hypercast_config::{Config, FmTierConfig, Tier};
use hypercast_core::logging;
use hypercast_data::dataset::Dataset;
use hypercast_stream::streams;

/// How long a body may take to come. A push of many megabytes is to have the time, too.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// What handlers share.
pub(super) struct App {
    /// The configuration of the start.
    pub(super) config: Config,
    /// What of it can change.
    pub(super) settings: Arc<Settings>,
    pub(super) reloader: Reloader,
    pub(super) tier: Tier,
    pub(super) loaded: OnceLock<Loaded>,
    pub(super) workers: Workers,
    /// Threads of their own for events, which wait for the disk.
    pub(super) intake: Workers,
    pub(super) admission: Arc<Admission>,
    /// One push at a time: each may be large, and is compiled.
    pub(super) pushes: Arc<Semaphore>,
    pub(super) metrics: Arc<Metrics>,
}

/// The models of a process.
pub(super) struct Loaded {
    /// What serves now.
    pub(super) models: Arc<Models>,
    /// Features and experts; none in a tier of the FM alone.
    pub(super) service: Option<Arc<Service>>,
    /// Pushed versions on their way; none in a tier without experts.
    pub(super) rollouts: Option<Arc<Rollouts>>,
    /// What follows the registry; it stops with the process' routes.
    following: Following,
}

impl App {
    pub(super) fn loaded(&self) -> std::result::Result<&Loaded, Refusal> {
        self.loaded.get().ok_or(Refusal::Starting)
    }

    /// Who may ask.
    pub(super) fn access(&self) -> &Arc<Access> {
        &self.reloader.access
    }

    /// Reads the configuration again; none before the models are loaded. Blocks.
    pub(super) fn reload(&self) -> Option<Result<Outcome>> {
        let following = &self.loaded.get()?.following;
        Some(self.reloader.reload(|config| following.reload(config.clone())))
    }
}

pub(super) fn fm_config(config: &Config, tier: Tier) -> &FmTierConfig {
    match tier {
        Tier::All | Tier::Expert | Tier::FmServing | Tier::Ingest => &config.fm_serving,
        Tier::FmLogging => &config.fm_logging,
    }
}

/// Binds, loads, serves until `stop` resolves, then finishes what was accepted.
/// `ready` is told where (`http://ADDRESS` or `https://ADDRESS`) once models are loaded.
///
/// # Errors
/// A configuration that is wrong; an address that cannot be bound, or that may not be without protection; whatever loading says.
pub async fn serve(
    origin: Origin,
    stop: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(&str) + Send + 'static,
) -> Result<()> {
    let (config, tier) = (origin.read()?, origin.tier);
    logging::set_levels(&config.server.log)?;
    let metrics = Arc::new(Metrics::new());
    let addresses = listen::resolve(&config.server).await?;
    // Before anything is open: what others would reach may not be without protection.
    let access = Access::new(&config.server, &addresses, &metrics)?;
    let bound = Bound::new(&config.server, &addresses, &metrics).await?;
    let settings = Settings::new(config.clone());
    let reloader = Reloader::new((origin, settings.clone()), (access, bound.tls()), &metrics);
    if tier == Tier::Ingest {
        return ingest::serve((config, settings), (bound, metrics, reloader), stop, ready).await;
    }
    let size = PoolSize { threads: config.server.threads, queue: config.server.queue };
    let workers = Workers::start(size)
        .map_err(|error| Error::invalid(format!("cannot start threads: {error}")))?;
    let intake = Workers::start(PoolSize { threads: 2, ..size })
        .map_err(|error| Error::invalid(format!("cannot start threads: {error}")))?;
    let most = match tier {
        Tier::All | Tier::Expert | Tier::Ingest => config.server.queue,
        Tier::FmServing | Tier::FmLogging => fm_config(&config, tier).queue,
    };
    let app = Arc::new(App {
        tier,
        loaded: OnceLock::new(),
        workers,
        intake,
        admission: Admission::new(most),
        pushes: Arc::new(Semaphore::new(1)),
        metrics,
        settings,
        reloader,
        config,
    });
    let own = Arc::downgrade(&app);
    reload::at_signals(move || own.upgrade()?.reload())?;
    let url = bound.url();
    let (failed, failure) = oneshot::channel();
    let (loading, handle) = (app.clone(), Handle::current());
    std::thread::spawn(move || {
        match load((&loading.config, &loading.settings), loading.tier, &loading.metrics, handle) {
            Ok(loaded) => {
                // Only this thread sets it.
                let _ = loading.loaded.set(loaded);
                ready(&url);
            }
            // The receiver is gone only if the server has stopped already.
            Err(error) => drop(failed.send(error)),
        }
    });
    let (halt, halted) = oneshot::channel::<()>();
    let server = tokio::spawn(bound.serve(routes::of(app.clone()), async {
        // An error means that the sender is gone, which is a reason to stop too.
        let _ = halted.await;
    }));
    let outcome = tokio::select! {
        () = stop => Ok(()),
        Ok(error) = failure => Err(error),
    };
    let _ = halt.send(());
    let served = server.await;
    // What was accepted is finished: now its streams can end, with their states saved.
    let stopping = tokio::task::spawn_blocking(move || {
        if let Some(loaded) = app.loaded.get() {
            if let Some(rollouts) = &loaded.rollouts {
                rollouts.stop();
            }
            if let Some(service) = &loaded.service {
                service.stop();
            }
        }
    });
    if let Err(error) = stopping.await {
        tracing::error!(%error, "the streams did not stop well");
    }
    match served {
        Ok(()) => outcome,
        Err(error) => outcome.and(Err(Error::invalid(format!("the server failed: {error}")))),
    }
}

fn load(
    (config, settings): (&Config, &Arc<Settings>),
    tier: Tier,
    metrics: &Arc<Metrics>,
    handle: Handle,
) -> Result<Loaded> {
    let ranks = matches!(tier, Tier::All | Tier::Expert);
    let fm_config = match ranks {
        true => fm_config(config, tier).clone(),
        false => FmTierConfig { url: String::new(), ..fm_config(config, tier).clone() },
    };
    if tier == Tier::Expert && fm_config.url.is_empty() {
        return Err(Error::invalid(
            "--tier expert needs the FM's address in another process: set fm_serving.url",
        ));
    }
    let dataset = ranks.then(|| Dataset::open(&config.paths.dataset)).transpose()?;
    let schema = dataset.as_ref().map(|dataset| dataset.schema.clone());
    let streams = streams::open(&config.engine)?;
    let loader =
        Loader::new(config, &fm_config, schema.clone(), (streams.clone(), metrics.clone()))?;
    let wasm = loader.wasm();
    let begun = Begun::new(loader, (config, tier), schema, &*streams)?;
    let models = begun.models().clone();
    let load = |dataset| {
        Service::load(
            (settings.clone(), &dataset),
            streams.clone(),
            (models.clone(), metrics.clone()),
            handle,
        )
    };
    let service = dataset.map(load).transpose()?.map(Arc::new);
    let start = |service| rollouts::start(settings.clone(), service, (wasm, streams.clone()));
    let rollouts = service.clone().map(start).transpose()?.map(Arc::new);
    let following = begun.follow((streams, metrics.clone()), service.clone())?;
    Ok(Loaded { models, service, rollouts, following })
}

/// Runs on a worker thread what a request needs there, unless its deadline passes first.
pub(super) async fn on_worker<T: Send + 'static>(
    app: &App,
    deadline: Instant,
    run: impl FnOnce() -> std::result::Result<T, Refusal> + Send + 'static,
) -> std::result::Result<T, Refusal> {
    on_pool(&app.workers, deadline, run).await
}

/// The same on a pool of its own.
pub(super) async fn on_pool<T: Send + 'static>(
    workers: &Workers,
    deadline: Instant,
    run: impl FnOnce() -> std::result::Result<T, Refusal> + Send + 'static,
) -> std::result::Result<T, Refusal> {
    let (done, result) = oneshot::channel();
    workers
        .submit(move || {
            // Nobody waits for an answer after the deadline; a late one only delays others.
            if Instant::now() < deadline && !done.is_closed() {
                let _ = done.send(run());
            }
        })
        .map_err(|_| Refusal::Overloaded { retry_after_ms: 100 })?;
    match tokio::time::timeout_at(deadline.into(), result).await {
        Ok(Ok(answer)) => answer,
        // The job went without an answer: it was too late, or it panicked.
        Ok(Err(_)) if Instant::now() < deadline => {
            Err(Refusal::Internal("the request failed inside the host; see its log".into()))
        }
        Ok(Err(_)) | Err(_) => Err(Refusal::Deadline),
    }
}

/// How long a request has: what the caller says is left, at most `most_ms`.
///
/// # Errors
/// A header that is no number.
pub(super) fn time_left(
    headers: &HeaderMap,
    most_ms: u64,
) -> std::result::Result<Duration, Refusal> {
    let Some(value) = headers.get(DEADLINE_HEADER) else {
        return Ok(Duration::from_millis(most_ms));
    };
    let left_ms =
        value.to_str().ok().and_then(|text| text.parse::<u64>().ok()).ok_or_else(|| {
            Refusal::BadRequest(format!(
                "{DEADLINE_HEADER}: {value:?} is no number of milliseconds"
            ))
        })?;
    Ok(Duration::from_millis(left_ms.min(most_ms)))
}

/// An answer, timed and counted.
pub(super) fn told(
    app: &App,
    route: &'static str,
    start: Instant,
    outcome: std::result::Result<Response, Refusal>,
) -> Response {
    let response = outcome.unwrap_or_else(|refusal| refuse(&refusal));
    app.metrics.request(route, response.status().as_u16(), start.elapsed());
    response
}

pub(super) fn refuse(refusal: &Refusal) -> Response {
    let (status, code) = refusal.code();
    let mut response = refuse_with(status, code, &refusal.to_string());
    if let Refusal::Overloaded { retry_after_ms } = refusal {
        // Whole seconds are what the header can say.
        let seconds = retry_after_ms.div_ceil(1000).max(1);
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

pub(super) fn refuse_with(status: u16, code: &str, message: &str) -> Response {
    let body = RefusalBody { error: RefusalText { code: code.into(), message: message.into() } };
    json(StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &body)
}

pub(super) fn json(status: StatusCode, body: &impl Serialize) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => (status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A body as bytes, at most `most` of them.
///
/// # Errors
/// One that is longer, breaks off, or does not come within [`BODY_TIMEOUT`].
pub(super) async fn bytes(
    body: axum::body::Body,
    most: usize,
) -> std::result::Result<Bytes, Refusal> {
    let reading = axum::body::to_bytes(body, most);
    let Ok(read) = tokio::time::timeout(BODY_TIMEOUT, reading).await else {
        let waited_s = BODY_TIMEOUT.as_secs();
        return Err(Refusal::BadRequest(format!("the body did not come whole in {waited_s} s")));
    };
    read.map_err(|_| {
        Refusal::BadRequest(format!("the body is over {most} bytes (max_body_bytes), or broke off"))
    })
}
