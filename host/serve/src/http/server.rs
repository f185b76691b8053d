//! Starts a process: reads the configuration, binds the address, loads the tier's models, and
//! serves until it is told to stop.
//!
//! The server answers `/healthz` at once and everything else once the models are loaded.

use std::{
    future::pending,
    sync::{Arc, OnceLock},
};

use hypercast_config::{Config, DaemonTier, FmTierConfig};
use hypercast_core::{
    logging,
    shutdown::Shutdown,
    supervised_thread::{OnPanic, PanicWatch},
};
use hypercast_data::dataset::Dataset;
use hypercast_stream::streams;
use tokio::{
    runtime::Handle,
    sync::{Semaphore, oneshot},
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    http::{
        auth::AccessControl,
        bodies::BodyBudget,
        ingest,
        listen::{self, Listeners, ProbeServer},
        reload::{self, Origin, ReloadOutcome, Reloader, Settings},
        routes,
    },
    metrics::Metrics,
    request::{
        admission::Admission,
        api::{Refusal, RequestResult},
        service::{RankingContext, RankingService},
        workers::Workers,
    },
    rollout::{RolloutService, serving},
    versions::{
        follow::{FollowThreads, SetUpdater},
        loader::VersionLoader,
        serving_set::ServingModels,
    },
};

/// State that handlers share.
pub(crate) struct AppState {
    /// Has the configuration, of which a reload changes a part.
    pub(crate) reloader: Reloader,
    pub(crate) loaded: OnceLock<LoadedTier>,
    pub(crate) workers: Workers,
    /// Threads of their own for events, because storing them waits for the disk.
    pub(crate) intake: Workers,
    pub(crate) admission: Arc<Admission>,
    /// The memory of the bodies that are read.
    pub(crate) bodies: BodyBudget,
    /// Held by a push: only one is accepted at a time, because each may be large and is compiled.
    pub(crate) pushes: Arc<Semaphore>,
    /// Held by a look at files for `/readyz`, so that many probes take no more than one of the
    /// threads that block.
    pub(crate) looks: Arc<Semaphore>,
    pub(crate) metrics: Arc<Metrics>,
    /// Requested once all requests are answered: then no thread waits for the streams any longer.
    stop: Shutdown,
}

/// What a process has loaded.
pub(crate) struct LoadedTier {
    /// The versions that serve.
    pub(crate) models: Arc<ServingModels>,
    /// Features and experts; none in the FM's tiers.
    pub(crate) service: Option<Arc<RankingService>>,
    /// Rollouts of pushed versions; none in a tier without experts.
    pub(crate) rollouts: Option<Arc<RolloutService>>,
    /// The threads that follow the registry; dropping it stops them.
    following: FollowThreads,
}

impl AppState {
    pub(crate) fn loaded(&self) -> RequestResult<&LoadedTier> {
        self.loaded.get().ok_or(Refusal::Starting)
    }

    /// Reloads the configuration; none before the models are loaded. Blocks.
    pub(crate) fn reload(&self) -> Option<Result<ReloadOutcome>> {
        let following = &self.loaded.get()?.following;
        Some(self.reloader.reload(|config| following.reload(config.clone())))
    }
}

pub(crate) fn fm_config(config: &Config, tier: DaemonTier) -> &FmTierConfig {
    match tier {
        DaemonTier::All | DaemonTier::Expert | DaemonTier::FmServing | DaemonTier::Ingest => {
            &config.fm_serving
        }
        DaemonTier::FmLogging => &config.fm_logging,
    }
}

/// Binds, loads, serves until `stop` resolves, then finishes what was accepted. Calls `ready` with
/// the URL once the models are loaded.
///
/// # Errors
/// The configuration is wrong; the address cannot be bound or would be unprotected; loading fails.
pub async fn serve(
    origin: Origin,
    stop: impl Future<Output = ()> + Send + 'static,
    ready: impl FnOnce(&str) + Send + 'static,
) -> Result<()> {
    let (config, tier) = (origin.read()?, origin.tier);
    logging::set_levels(&config.server.log)?;
    let metrics = Arc::new(Metrics::default());
    let addresses = listen::resolve(&config.server).await?;
    // Before anything is opened, because an address that others reach must be protected.
    let access = AccessControl::new(&config.server, &addresses, &metrics)?;
    let listeners = Listeners::new(&config.server, &addresses, &metrics).await?;
    let tls = listeners.requests.tls.clone();
    let settings = Arc::new(Settings::new(config));
    let reloader = Reloader::new(origin, settings.clone(), access, tls, &metrics);
    if tier == DaemonTier::Ingest {
        return ingest::serve(listeners, metrics, reloader, stop, ready).await;
    }
    let config = settings.now();
    let workers = Workers::start(config.server.threads, config.server.queue)?;
    let intake = Workers::start(2, config.server.queue)?;
    let most = match tier {
        DaemonTier::All | DaemonTier::Expert | DaemonTier::Ingest => config.server.queue,
        DaemonTier::FmServing | DaemonTier::FmLogging => fm_config(&config, tier).queue,
    };
    let app = Arc::new(AppState {
        loaded: OnceLock::new(),
        workers,
        intake,
        admission: Admission::new(most),
        bodies: BodyBudget::new(config.inflight_body_bytes(), &metrics),
        pushes: Arc::new(Semaphore::new(1)),
        looks: Arc::new(Semaphore::new(1)),
        metrics,
        reloader,
        stop: Shutdown::default(),
    });
    let own = Arc::downgrade(&app);
    reload::at_signals(move || own.upgrade()?.reload())?;
    let Listeners { requests, probes } = listeners;
    let probes = ProbeServer::start(probes, routes::probes(app.clone()));
    let url = requests.url();
    let (failed, failure) = oneshot::channel();
    let (loading, handle) = (app.clone(), Handle::current());
    std::thread::spawn(move || {
        match load(&loading, handle) {
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
    let router = routes::of(app.clone());
    let server = tokio::spawn(async move {
        let _watched = PanicWatch::new("connections", OnPanic::EndProcess);
        // An error means that the sender is gone, which is a reason to stop, too.
        requests.serve(router, async { drop(halted.await) }).await;
    });
    let failure = async {
        match failure.await {
            Ok(error) => error,
            Err(_) if app.loaded.get().is_none() => {
                Error::internal("loading the models panicked; see the log")
            }
            Err(_) => pending().await,
        }
    };
    let outcome = tokio::select! {
        () = stop => Ok(()),
        error = failure => Err(error),
    };
    let _ = halt.send(());
    let served = server.await;
    // Every accepted request is answered now, so the streams can stop and save their state.
    let stopped = app.clone();
    let stopping = tokio::task::spawn_blocking(move || {
        stopped.stop.request();
        if let Some(loaded) = stopped.loaded.get() {
            if let Some(rollouts) = &loaded.rollouts {
                rollouts.stop();
            }
            if let Some(service) = &loaded.service {
                service.streams.threads.stop();
            }
        }
    });
    if let Err(error) = stopping.await {
        tracing::error!(%error, "stopping the streams failed");
    }
    probes.stop().await;
    // Nobody else has it now, and dropping it waits for its threads.
    if let Err(error) = tokio::task::spawn_blocking(move || drop(app)).await {
        tracing::error!(%error, "unloading the models failed");
    }
    match served {
        Ok(()) => outcome,
        Err(error) => outcome.and(Err(Error::internal(format!("the server failed: {error}")))),
    }
}

fn load(app: &AppState, handle: Handle) -> Result<LoadedTier> {
    let AppState { reloader: Reloader { settings, origin, .. }, metrics, .. } = app;
    let (config, tier) = (&*settings.now(), origin.tier);
    let ranks = matches!(tier, DaemonTier::All | DaemonTier::Expert);
    let mut fm_config = fm_config(config, tier).clone();
    if !ranks {
        fm_config.url.clear();
    }
    if tier == DaemonTier::Expert && fm_config.url.is_empty() {
        return Err(Error::invalid(
            "--tier expert needs the FM's address in another process: set fm_serving.url",
        ));
    }
    let dataset = ranks.then(|| Dataset::open(&config.paths.dataset)).transpose()?;
    let schema = dataset.as_ref().map(|dataset| dataset.schema.clone());
    let streams = streams::open_with_shutdown(&config.engine, &app.stop)?;
    let loader =
        VersionLoader::new(config, &fm_config, schema.clone(), streams.clone(), metrics.clone())?;
    let wasm = loader.wasm.clone();
    let updater = SetUpdater::new(loader, config, schema, &*streams)?;
    let models = updater.models.clone();
    let load = |dataset| {
        let (settings, models, metrics) = (settings.clone(), models.clone(), metrics.clone());
        let context = RankingContext { settings, models, metrics, handle };
        RankingService::load(context, &dataset, streams.clone())
    };
    let service = dataset.map(load).transpose()?.map(Arc::new);
    let start = |service| serving::start(settings.clone(), service, wasm, streams.clone());
    let rollouts = service.clone().map(start).transpose()?.map(Arc::new);
    let following = updater.start(streams, metrics.clone(), service.clone())?;
    Ok(LoadedTier { models, service, rollouts, following })
}
