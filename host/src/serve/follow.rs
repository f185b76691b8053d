//! Following: the registry's decisions into what serves, and outcomes into what
//! is known of predictions. Everything new is loaded here, off the path of requests; where it cannot be, the set
//! before goes on serving and the reason is told.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use hypercast_fm::priority::give_way;

use super::{loader::Loader, metrics::Metrics, plan::Plan, service::Service, set::Models};
use crate::{
    clock::now_ms,
    config::{Config, Tier},
    engine::{Engine, Topic},
    error::{Error, Result},
    join::{Known, Outcome},
    schema::Schema,
    versions::Follower,
};

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
        streams: &dyn Engine,
    ) -> Result<Self> {
        let mut follower = Follower::new(streams)?;
        follower.catch_up()?;
        let plan = Plan::new(config, tier, schema.as_deref(), follower.registry())?;
        let models = Arc::new(Models::new(loader.load(&plan, None, follower.position())?));
        let config = config.clone();
        Ok(Self { registrar: Registrar { config, tier, schema, loader, follower, plan, models } })
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
        (streams, metrics): (Arc<dyn Engine>, Arc<Metrics>),
        service: Option<Arc<Service>>,
    ) -> Result<Following> {
        let mut following = Following { stop: Arc::default(), threads: Vec::new() };
        let registrar = self.registrar;
        let feeds = registrar.loader.feeds();
        following.spawn("weights", move |stop| {
            give_way();
            feeds.follow(stop, &metrics);
        })?;
        following.spawn("versions", move |stop| registrar.follow(stop))?;
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
}

impl Following {
    fn spawn(&mut self, name: &str, run: impl FnOnce(&AtomicBool) + Send + 'static) -> Result<()> {
        let stop = self.stop.clone();
        let thread = std::thread::Builder::new()
            .name(name.into())
            .spawn(move || run(&stop))
            .map_err(|error| Error::Invalid(format!("cannot start a thread: {error}")))?;
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
    tier: Tier,
    schema: Option<Arc<Schema>>,
    loader: Loader,
    follower: Follower,
    /// What was last loaded, or could not be.
    plan: Plan,
    models: Arc<Models>,
}

impl Registrar {
    fn follow(mut self, stop: &AtomicBool) {
        let mut tried = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            match self.follower.poll(WAIT) {
                // A trainer may have published meanwhile what was missing.
                Ok(false) if self.models.problem().is_some() && tried.elapsed() > RETRY => {
                    tried = Instant::now();
                    let outcome = self.swap();
                    self.tell(outcome);
                }
                Ok(false) => {}
                Ok(true) => {
                    let outcome = self.follower.catch_up().and_then(|()| self.swap());
                    self.tell(outcome);
                }
                Err(error) => {
                    self.tell(Err(error));
                    std::thread::sleep(REST);
                }
            }
        }
    }

    fn swap(&mut self) -> Result<()> {
        let registry = self.follower.registry();
        let plan = Plan::new(&self.config, self.tier, self.schema.as_deref(), registry)?;
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

    fn tell(&self, outcome: Result<()>) {
        if let Err(error) = outcome {
            tracing::error!(%error, "a change of versions cannot be served; what served before goes on");
            self.models.tell(Some(error.to_string()));
        }
    }
}

/// From the end of the stream on: what was served before this process began is not known to it.
fn follow_outcomes(streams: &dyn Engine, service: &Service, stop: &AtomicBool) {
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
            match Outcome::decode(&stored.payload).map(|outcome| outcome.known) {
                Ok(Known::Outcome(impression)) => {
                    service.served().outcome(&impression, service.schema(), now);
                }
                // What was corrected was compared as it was first known.
                Ok(Known::Corrected(_) | Known::Item(_) | Known::User(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, position = stored.position, "an outcome cannot be read");
                }
            }
        }
    }
}
