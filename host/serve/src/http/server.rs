//! Starts a process: reads the configuration, binds the address, loads the tier's models, and
//! serves until it is told to stop.
//!
//! The server answers `/healthz` at once and everything else once the models are loaded.

use std::{
    future::pending,
    sync::{Arc, Mutex, OnceLock},
};

use hypercast_config::{Config, DaemonTier, FmTierConfig};
use hypercast_core::{
    logging,
    supervised_thread::{OnPanic, PanicWatch},
};
use hypercast_data::{
    dataset::Dataset,
    schema::{ColumnUpgrade, Schema, SchemaWatch},
};
use hypercast_expert::Engine;
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
        growth, ingest,
        listen::{self, Listeners, ProbeServer},
        reload::{self, Origin, ReloadOutcome, ReloadedModels, Reloader, Settings},
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
    threads::{Current, ThreadGroup, lock},
    versions::{
        follow::{FollowThreads, SetUpdater},
        loader::{LoaderContext, LoaderSchema, VersionLoader},
        serving_set::ServingModels,
    },
};

/// State that handlers share.
pub(crate) struct AppState {
    /// Has the configuration, of which a reload changes a part.
    pub(crate) reloader: Reloader,
    /// Replaced as a whole when the schema has grown.
    loaded: OnceLock<Current<LoadedTier>>,
    /// Why the schema that has grown is not used yet.
    pub(crate) growth_problem: Mutex<Option<String>>,
    /// Held while a growth is taken over, which has the reloader's turn already, and by the end of
    /// the process.
    growing: Mutex<()>,
    /// The runtime of calls to other processes.
    handle: Handle,
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
    /// Threads that live as long as the process. They are stopped once all requests are answered:
    /// then no thread waits for the streams any longer.
    threads: ThreadGroup,
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
    /// The schema of all this; none in the FM's tiers on a machine without a data set.
    watch: Option<Arc<SchemaWatch>>,
    /// The way to that schema from examples of before it grew.
    pub(crate) upgrade: Option<Arc<ColumnUpgrade>>,
    /// What goes on when all this is loaded anew.
    shared: LoaderContext,
}

impl LoadedTier {
    /// Whether it is to be loaded anew: its schema has grown. Once its streams have ended, that
    /// stays so, whatever the schema is then.
    fn is_outgrown(&self) -> bool {
        match (&self.service, &self.watch) {
            (Some(service), _) => service.streams.threads.stop.is_requested(),
            (None, Some(watch)) => watch.has_grown(),
            (None, None) => false,
        }
    }

    /// Ends what has one owner in a system: the streams, their state, and rollouts. Requests go on
    /// with the features that are known.
    fn stop(&self) {
        if let Some(rollouts) = &self.rollouts {
            rollouts.stop();
        }
        self.following.stop();
        if let Some(service) = &self.service {
            service.streams.threads.stop();
        }
    }
}

impl AppState {
    /// What is loaded now. A request calls this once.
    pub(crate) fn loaded(&self) -> RequestResult<Arc<LoadedTier>> {
        Ok(self.loaded.get().ok_or(Refusal::Starting)?.now())
    }

    /// Reloads the configuration, and takes over a schema that has grown; none before the models
    /// are loaded. Blocks.
    pub(crate) fn reload(&self) -> Option<Result<ReloadOutcome>> {
        let loaded = self.loaded.get()?;
        Some(self.reloader.reload(|config| {
            let schema = self.take_growth_over(config)?;
            let experts = loaded.now().following.reload(config.clone())?;
            Ok(ReloadedModels { schema, experts })
        }))
    }

    /// Loads all that depends on the schema anew, if that has grown, beside what serves meanwhile;
    /// the next request finds it. Returns whether the schema had grown. Blocks.
    ///
    /// # Errors
    /// Something cannot be loaded under the new schema. Requests go on to be answered under the old
    /// one, and features stand still.
    fn take_growth_over(&self, config: &Config) -> Result<bool> {
        let _turn = lock(&self.growing);
        let Some(loaded) = self.loaded.get() else { return Ok(false) };
        let before = loaded.now();
        if self.threads.stop.is_requested() {
            return Ok(false);
        }
        if !before.is_outgrown() {
            *lock(&self.growth_problem) = None;
            return Ok(false);
        }
        tracing::info!("the schema has grown; loading anew beside what serves");
        let grown =
            load(self, config, Some(&before)).map_err(|error| error.within("the schema has grown"));
        *lock(&self.growth_problem) = grown.as_ref().err().map(ToString::to_string);
        loaded.replace(grown?);
        tracing::info!("the schema that has grown is used from the next request on");
        Ok(true)
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
        growth_problem: Mutex::default(),
        growing: Mutex::default(),
        handle: Handle::current(),
        workers,
        intake,
        admission: Admission::new(most),
        bodies: BodyBudget::new(config.inflight_body_bytes(), &metrics),
        pushes: Arc::new(Semaphore::new(1)),
        looks: Arc::new(Semaphore::new(1)),
        metrics,
        reloader,
        threads: ThreadGroup::default(),
    });
    let own = Arc::downgrade(&app);
    reload::at_signals(move || own.upgrade()?.reload())?;
    let own = Arc::downgrade(&app);
    growth::follow(move || {
        let app = own.upgrade()?;
        Some(app.reloader.between_reloads(|config| app.take_growth_over(config)))
    });
    let Listeners { requests, probes } = listeners;
    let probes = ProbeServer::start(probes, routes::probes(app.clone()));
    let url = requests.url();
    let (failed, failure) = oneshot::channel();
    let loading = app.clone();
    std::thread::spawn(move || {
        match load(&loading, &loading.reloader.settings.now(), None) {
            Ok(loaded) => {
                // Only this thread sets it.
                let _ = loading.loaded.set(Current::new(loaded));
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
        stopped.threads.stop();
        let _turn = lock(&stopped.growing);
        if let Some(loaded) = stopped.loaded.get() {
            loaded.now().stop();
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

/// Loads all that a process serves with. What is loaded after `before`, because the schema has
/// grown, goes on with what that had; the streams of `before` are ended last.
fn load(app: &AppState, config: &Config, before: Option<&LoadedTier>) -> Result<LoadedTier> {
    let AppState { reloader: Reloader { settings, origin, .. }, metrics, handle, .. } = app;
    let tier = origin.tier;
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
    let path = config.paths.dataset.join("schema.toml");
    let schema = match &dataset {
        Some(dataset) => Some(dataset.schema.clone()),
        // A machine that runs the FM alone may have no data set.
        None => path.is_file().then(|| Schema::load(&path)).transpose()?.map(Arc::new),
    };
    let watch = schema.clone().map(|schema| Arc::new(SchemaWatch::new(path, schema)));
    // Experts in another process send an FM the core alone.
    let upgrade = schema.as_deref().map(|schema| Arc::new(ColumnUpgrade::new(&schema.core())));
    let shared = match before {
        Some(before) => before.shared.clone(),
        None => LoaderContext {
            streams: streams::open_with_shutdown(&config.engine, &app.threads.stop)?,
            wasm: Engine::new(config.guests())?,
            metrics: metrics.clone(),
        },
    };
    let streams = shared.streams.clone();
    let of_experts = schema.clone().filter(|_| ranks);
    let schema = match &dataset {
        Some(Dataset { schema, content, .. }) => {
            LoaderSchema::OfExperts { schema: schema.clone(), content_dim: *content }
        }
        None => LoaderSchema::OfFm(schema),
    };
    let loader = VersionLoader::new(config, &fm_config, schema, shared.clone())?;
    let updater = SetUpdater::new(loader, config, of_experts, &*streams)?;
    if let Some(before) = before {
        before.stop();
    }
    let models = updater.models.clone();
    let stop = match watch.clone() {
        Some(watch) => app.threads.stop.part(move || watch.has_grown()),
        None => app.threads.stop.clone(),
    };
    let load = |dataset| {
        let (settings, models, metrics) = (settings.clone(), models.clone(), metrics.clone());
        let context = RankingContext { settings, models, metrics, handle: handle.clone(), stop };
        let before = before.and_then(|before| before.service.as_deref());
        RankingService::load(context, &dataset, streams.clone(), before)
    };
    let service = dataset.map(load).transpose()?.map(Arc::new);
    if let (None, Some(service)) = (before, &service) {
        // A growth does not end them: another process may join while this one cannot take it over.
        let writer = service.streams.intake.writer.clone();
        app.threads.spawn("ticks", move |stop| writer.tick(stop))?;
    }
    let start = |service| {
        let before = before.and_then(|before| before.rollouts.as_deref());
        serving::start(settings.clone(), service, &shared, before)
    };
    let rollouts = service.clone().map(start).transpose()?.map(Arc::new);
    let following = before.map(|before| &before.following);
    let following = updater.start(streams, metrics.clone(), service.clone(), following)?;
    Ok(LoadedTier { models, service, rollouts, following, watch, upgrade, shared })
}
