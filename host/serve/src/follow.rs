//! Following: the registry's decisions into what serves, and outcomes into what
//! is known of predictions. Everything new is loaded here, off the path of requests; where it cannot be, the set
//! before goes on serving and the reason is told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use hypercast_fm::priority::lower_thread_priority;

use super::{
    loader::Loader,
    metrics::Metrics,
    plan::{Contents, Plan, contents},
    ready,
    service::Service,
    set::Models,
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, Tier};
use hypercast_core::clock::now_ms;
use hypercast_data::schema::Schema;
use hypercast_stream::join::{OutcomeRecord, StateUpdate};
use hypercast_stream::registry::RegistryFollower;
use hypercast_stream::streams::{StreamEngine, Topic};

/// How long one look into a stream waits for something to come.
const WAIT: Duration = Duration::from_millis(200);

/// How long a stream that failed is left alone.
const REST: Duration = Duration::from_secs(1);

/// How often what could not be loaded is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Records a look.
const MOST: usize = 4096;

/// What serves first, loaded; nothing runs yet.
pub struct Begun {
    registrar: Registrar,
}

impl Begun {
    /// Reads the registry, and loads what serves first.
    ///
    /// # Errors
    /// Streams that cannot be read, or a version that cannot be loaded: a daemon starts whole or not at all.
    pub fn new(
        loader: Loader,
        (config, tier): (&Config, Tier),
        schema: Option<Arc<Schema>>,
        streams: &dyn StreamEngine,
    ) -> Result<Self> {
        let mut follower = RegistryFollower::new(streams)?;
        follower.catch_up()?;
        let contents = contents(config);
        let mut plan = Plan::new(config, tier, schema.as_deref(), follower.registry())?;
        plan.tell_apart(&contents);
        let models = Arc::new(Models::new(loader.load(&plan, None, follower.position())?));
        let config = config.clone();
        let registrar =
            Registrar { config, contents, tier, schema, loader, follower, plan, models };
        registrar.tell_missing();
        Ok(Self { registrar })
    }

    /// Where requests find what serves.
    pub fn models(&self) -> &Arc<Models> {
        &self.registrar.models
    }

    /// Starts to follow; outcomes, where there is a service that answers.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn follow(
        self,
        (streams, metrics): (Arc<dyn StreamEngine>, Arc<Metrics>),
        service: Option<Arc<Service>>,
    ) -> Result<Following> {
        let (asks, asked) = sync_channel(1);
        let mut following = Following { stop: Arc::default(), threads: Vec::new(), asks };
        let registrar = self.registrar;
        let feeds = registrar.loader.feeds();
        following.spawn("weights", move |stop| {
            lower_thread_priority();
            feeds.follow(stop, &metrics);
        })?;
        following.spawn("versions", move |stop| registrar.follow(stop, &asked))?;
        if let Some(service) = service {
            following.spawn("outcomes", move |stop| follow_outcomes(&*streams, &service, stop))?;
        }
        Ok(following)
    }
}

/// The threads that follow; dropping it ends them.
pub struct Following {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    asks: SyncSender<Ask>,
}

/// Another configuration, and who waits for what comes of it.
struct Ask {
    config: Config,
    done: SyncSender<Result<bool>>,
}

impl Following {
    /// Loads the experts of another configuration, where they or their files changed, and lets them serve; whether any did. Blocks.
    ///
    /// # Errors
    /// What cannot be loaded; what served before goes on.
    pub fn reload(&self, config: Config) -> Result<bool> {
        let (done, outcome) = sync_channel(1);
        let ended = || Error::invalid("versions are no longer followed; see the log");
        self.asks.send(Ask { config, done }).map_err(|_| ended())?;
        outcome.recv().map_err(|_| ended())?
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce(&AtomicBool) + Send + 'static) -> Result<()> {
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&stop))
            .map_err(|error| Error::invalid(format!("cannot start a thread: {error}")))?;
        self.threads.push(thread);
        Ok(())
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

/// Turns decisions into sets.
struct Registrar {
    config: Config,
    /// Of the experts of the configuration.
    contents: Contents,
    tier: Tier,
    schema: Option<Arc<Schema>>,
    loader: Loader,
    follower: RegistryFollower,
    /// What was last loaded, or could not be.
    plan: Plan,
    models: Arc<Models>,
}

impl Registrar {
    fn follow(mut self, stop: &AtomicBool, asked: &Receiver<Ask>) {
        let mut tried = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            if let Ok(Ask { config, done }) = asked.try_recv() {
                // Who asked may have given up.
                let _ = done.send(self.reload(config));
            }
            match self.follower.poll(WAIT) {
                // A trainer may have published meanwhile what was missing.
                Ok(false) if self.models.problem().is_some() && tried.elapsed() > RETRY => {
                    tried = Instant::now();
                    let outcome = self.swap();
                    self.tell(outcome);
                }
                Ok(false) => {}
                Ok(true) => {
                    let outcome =
                        self.follower.catch_up().map_err(Error::from).and_then(|()| self.swap());
                    self.tell(outcome);
                }
                Err(error) => {
                    self.tell(Err(error.into()));
                    std::thread::sleep(REST);
                }
            }
        }
    }

    /// Serves another configuration's experts, or goes on with the old ones.
    fn reload(&mut self, config: Config) -> Result<bool> {
        let contents = contents(&config);
        if self.schema.is_none()
            || (config.experts == self.config.experts && contents == self.contents)
        {
            return Ok(false);
        }
        let before = (
            std::mem::replace(&mut self.config, config),
            std::mem::replace(&mut self.contents, contents),
        );
        let served = self.models.set();
        if let Err(error) = self.swap() {
            (self.config, self.contents) = before;
            return Err(error);
        }
        self.tell_missing();
        Ok(!Arc::ptr_eq(&served, &self.models.set()))
    }

    fn swap(&mut self) -> Result<()> {
        let registry = self.follower.registry();
        let mut plan = Plan::new(&self.config, self.tier, self.schema.as_deref(), registry)?;
        plan.tell_apart(&self.contents);
        // Versions that only train change nothing here.
        if plan == self.plan && self.models.problem().is_none() {
            return Ok(());
        }
        let old = self.models.set();
        let set = self.loader.load(&plan, Some(&old), self.follower.position())?;
        self.models.swap(set);
        self.plan = plan;
        tracing::info!(revision = self.follower.position(), "another set of versions serves");
        Ok(())
    }

    fn tell_missing(&self) {
        let known = ready::Known::of(&self.models.set(), self.schema.is_some());
        self.models.tell_missing(ready::missing(self.follower.registry(), &known));
    }

    fn tell(&self, outcome: Result<()>) {
        self.tell_missing();
        if let Err(error) = outcome {
            tracing::error!(%error, "a change of versions cannot be served; what served before goes on");
            self.models.tell(Some(error.to_string()));
        }
    }
}

/// From the end of the stream on: what was served before this process began is not known to it.
fn follow_outcomes(streams: &dyn StreamEngine, service: &Service, stop: &AtomicBool) {
    let topic = Topic::outcomes();
    let open = || streams.reader(&topic, streams.span(&topic)?.end);
    let mut reader = None;
    while !stop.load(Ordering::Relaxed) {
        let next = match &mut reader {
            None => open().map(|opened| {
                reader = Some(opened);
                Vec::new()
            }),
            Some(reader) => reader.next(MOST, WAIT),
        };
        let records = next.unwrap_or_else(|error| {
            tracing::warn!(%error, "outcomes cannot be read; trying again");
            reader = None;
            std::thread::sleep(REST);
            Vec::new()
        });
        let now = now_ms();
        for stored in records {
            match OutcomeRecord::decode(&stored.payload).map(|outcome| outcome.update) {
                Ok(StateUpdate::Outcome(impression)) => {
                    service.served().outcome(&impression, service.schema(), now);
                }
                // What was corrected was compared as it was first known.
                Ok(StateUpdate::Corrected(_) | StateUpdate::Item(_) | StateUpdate::User(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, position = stored.position, "an outcome cannot be read");
                }
            }
        }
    }
}
