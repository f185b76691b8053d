//! Follows the registry's decisions. New versions are loaded here, off the path of requests. If one
//! cannot be loaded, the old set keeps serving and the reason is reported.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_core::{logging::RepeatedFailures, shutdown::Shutdown};
use hypercast_data::schema::Schema;
use hypercast_fm::threads::lower_thread_priority;
use hypercast_stream::{
    registry::{ExpertVersion, Registry, RegistryFollower, VersionState},
    streams::{StreamEngine, StreamPlace},
};

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::Metrics,
    request::service::RankingService,
    threads::{ThreadGroup, lock},
    versions::{
        desired_set::{DesiredSet, ExpertFileHashes, expert_file_hashes},
        loader::VersionLoader,
        outcomes::{OutcomeUses, REST, WAIT, follow_outcomes},
        serving_set::{ServedFm, ServingModels},
    },
};

/// How often versions that could not be loaded are tried again, and files of FMs that could be made
/// anew are looked at.
const RETRY: Duration = Duration::from_secs(5);

/// Turns registry decisions into serving sets.
pub struct SetUpdater {
    /// Of the configured experts.
    expert_file_hashes: ExpertFileHashes,
    schema: Option<Arc<Schema>>,
    loader: VersionLoader,
    follower: RegistryFollower,
    /// The set that was last loaded.
    plan: DesiredSet,
    failures: RepeatedFailures,
    /// The versions that serve.
    pub(crate) models: Arc<ServingModels>,
}

impl SetUpdater {
    /// Reads the registry and loads the first set.
    ///
    /// # Errors
    /// A stream cannot be read, or a version cannot be loaded: a daemon starts with everything or
    /// not at all.
    pub fn new(
        loader: VersionLoader,
        config: &Config,
        schema: Option<Arc<Schema>>,
        streams: &dyn StreamEngine,
    ) -> Result<Self> {
        let mut follower = RegistryFollower::new(streams)?;
        follower.catch_up(streams)?;
        let expert_file_hashes = expert_file_hashes(config);
        let (of, hashes) = (schema.as_deref(), &expert_file_hashes);
        let plan = DesiredSet::new(config, of, follower.registry(), hashes)?;
        let models = Arc::new(ServingModels::new(loader.load(&plan, None, follower.position())?));
        let failures = RepeatedFailures::default();
        let updater =
            SetUpdater { expert_file_hashes, schema, loader, follower, plan, failures, models };
        updater.report_missing();
        Ok(updater)
    }

    /// Starts the threads that follow weights, versions and, if there is a service, outcomes; these
    /// are compared from where `before`, whose threads have ended, stopped.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn start(
        self,
        streams: Arc<dyn StreamEngine>,
        metrics: Arc<Metrics>,
        service: Option<Arc<RankingService>>,
        before: Option<&FollowThreads>,
    ) -> Result<FollowThreads> {
        let (asks, asked) = sync_channel(1);
        let compared = before.map(|before| before.compared.clone()).unwrap_or_default();
        let following = FollowThreads { threads: ThreadGroup::default(), asks, compared };
        let feeds = self.loader.feeds.clone();
        following.threads.spawn("weights", move |stop| {
            lower_thread_priority();
            feeds.follow(stop, &metrics);
        })?;
        let registry = streams.clone();
        following.threads.spawn("versions", move |stop| self.follow(&*registry, stop, &asked))?;
        if let Some(service) = service {
            let compared = following.compared.clone();
            following.threads.spawn("outcomes", move |stop| {
                let uses = OutcomeUses {
                    predictions: &service.predictions,
                    arms: &service.arm_outcomes,
                    models: Some(&service.models),
                    schema: &service.converter.schema,
                };
                follow_outcomes(&*streams, uses, &compared, stop);
            })?;
        }
        Ok(following)
    }

    fn follow(
        mut self,
        streams: &dyn StreamEngine,
        stop: &Shutdown,
        asked: &Receiver<ReloadRequest>,
    ) {
        let mut tried = Instant::now();
        while !stop.is_requested() {
            if let Ok(ReloadRequest { config, done }) = asked.try_recv() {
                // The caller may have gone.
                let _ = done.send(self.reload(config));
            }
            match self.follower.poll(streams, WAIT) {
                // A trainer may have published what was missing.
                Ok(false) if tried.elapsed() > RETRY => {
                    tried = Instant::now();
                    let outcome = self.swap();
                    self.report(outcome);
                }
                Ok(false) => {}
                Ok(true) => {
                    let caught_up = self.follower.catch_up(streams).map_err(Error::from);
                    let outcome = caught_up.and_then(|()| self.swap());
                    self.report(outcome);
                }
                Err(error) => {
                    self.report(Err(error.into()));
                    std::thread::sleep(REST);
                }
            }
        }
    }

    /// Serves another configuration's experts and takes requests of as many candidates as it says,
    /// or keeps the old ones and their limit.
    fn reload(&mut self, config: Config) -> Result<bool> {
        if self.schema.is_none() {
            return Ok(false);
        }
        let hashes = expert_file_hashes(&config);
        let changed =
            config.experts != self.loader.config.experts || hashes != self.expert_file_hashes;
        let before = (
            std::mem::replace(&mut self.loader.config, config),
            std::mem::replace(&mut self.expert_file_hashes, hashes),
        );
        let served = self.models.set();
        // Loading checks what it loads, and what goes on to serve.
        let fits = if changed { self.swap() } else { self.loader.check_memory(&served) };
        if let Err(error) = fits {
            (self.loader.config, self.expert_file_hashes) = before;
            return Err(error);
        }
        let others = !Arc::ptr_eq(&served, &self.models.set());
        self.models.limit_candidates(self.loader.config.server.max_candidates);
        self.report_missing();
        Ok(others)
    }

    fn swap(&mut self) -> Result<()> {
        let registry = self.follower.registry();
        let (schema, hashes) = (self.schema.as_deref(), &self.expert_file_hashes);
        let plan = DesiredSet::new(&self.loader.config, schema, registry, hashes)?;
        let old = self.models.set();
        let is_sound = || !old.fms().any(ServedFm::is_to_be_made_anew);
        // Versions that are only in training change nothing here.
        if plan == self.plan && self.models.problem().is_none() && is_sound() {
            return self.loader.check_memory(&old);
        }
        let set = self.loader.load(&plan, Some(&old), self.follower.position())?;
        self.models.swap(set);
        self.plan = plan;
        tracing::info!(revision = self.follower.position(), "another set of versions serves now");
        Ok(())
    }

    fn report_missing(&self) {
        let set = self.models.set();
        let fms: Vec<&str> = set.fms().map(|fm| fm.version()).collect();
        let arms = set.arms.iter();
        let experts: Vec<[&str; 3]> =
            arms.map(|arm| [&*arm.name, &*arm.version, &*arm.fm]).collect();
        let experts = self.schema.is_some().then_some(&*experts);
        let registry = self.follower.registry();
        let mut missing = missing(registry, &fms, experts);
        // What should serve is not known then, so the daemon cannot say that it does.
        missing.extend(
            registry.unapplied().map(|unapplied| format!("a decision: {}", unapplied.first)),
        );
        let unapplied = &self.loader.metrics.unapplied;
        unapplied.set(registry.unapplied().map_or(0, |unapplied| unapplied.count as i64));
        *lock(&self.models.missing) = missing;
    }

    fn report(&mut self, outcome: Result<()>) {
        self.report_missing();
        if let Err(error) = outcome {
            if self.failures.is_news(&error) {
                tracing::error!(%error, "a change of versions cannot be served; the versions before keep serving");
            }
            *lock(&self.models.problem) = Some(error.to_string());
        }
    }
}

/// The threads that follow; dropping it stops them.
pub struct FollowThreads {
    threads: ThreadGroup,
    asks: SyncSender<ReloadRequest>,
    /// Where the comparison of outcomes stopped; none if it never began.
    compared: Arc<Mutex<Option<StreamPlace>>>,
}

/// Another configuration, with a channel for the result.
struct ReloadRequest {
    config: Config,
    done: SyncSender<Result<bool>>,
}

impl FollowThreads {
    /// Ends the threads: versions are no longer followed.
    pub(crate) fn stop(&self) {
        self.threads.stop();
    }

    /// Loads the experts of another configuration if they or their files changed. Returns whether
    /// other experts serve now. Blocks.
    ///
    /// # Errors
    /// An expert cannot be loaded; the old ones keep serving then.
    pub fn reload(&self, config: Config) -> Result<bool> {
        let (done, outcome) = sync_channel(1);
        let ended = || Error::internal("versions are no longer followed; see the daemon's log");
        self.asks.send(ReloadRequest { config, done }).map_err(|_| ended())?;
        outcome.recv().map_err(|_| ended())?
    }
}

/// Active versions of the registry that are not loaded: experts, and the FMs that they pin. The
/// loaded experts are name, version and pinned FM; none in a process without experts.
fn missing(registry: &Registry, fms: &[&str], experts: Option<&[[&str; 3]]>) -> Vec<String> {
    let mut missing = Vec::new();
    let versions = registry.experts().flat_map(|(_, expert)| expert.in_order());
    for version in versions.filter(|version| version.state == VersionState::Active) {
        let ExpertVersion { name, version, fm, .. } = version;
        if experts.is_some_and(|loaded| !loaded.contains(&[name, version, fm])) {
            missing.push(format!("expert {name} {version} on FM {fm}"));
        }
        let pinned = format!("FM {fm}");
        if !fms.contains(&fm.as_str()) && !missing.contains(&pinned) {
            missing.push(pinned);
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use crate::fixtures::{expert_version, fm_version};
    use crate::fm::FmTier;
    use crate::versions::loader::{LoaderContext, LoaderSchema};
    use hypercast_config::PublishSettings;
    use hypercast_expert::Engine;
    use hypercast_fm::{
        device::DeviceKind,
        example::{Example, Item, Outcome, Target, User},
        spec::{FmConfig, FmSpec, TaskLabel, TaskSpec},
        trainer::{self, FmTrainer},
    };
    use hypercast_stream::{
        publish::{Publisher, TrainingPosition},
        registry::{Change, Decision, RegistryClient},
        streams::{MemoryEngine, Topic},
    };

    fn registry(state: VersionState) -> Registry {
        let expert = ExpertVersion { fm: "2.0.0".into(), ..expert_version("feed", "1.1.0") };
        let (name, version) = (expert.name.clone(), expert.version.clone());
        let mut registry = Registry::default();
        let changes = vec![
            Change::ExpertRegistered { expert: Box::new(expert) },
            Change::ExpertState { name, version, state },
        ];
        registry.apply(&Decision::new(changes)).unwrap();
        registry
    }

    /// A small FM that learns from one request after the other, and publishes.
    struct PublishingTrainer {
        trainer: Box<dyn FmTrainer>,
        publisher: Publisher,
        requests: u64,
    }

    impl PublishingTrainer {
        fn new(streams: &Arc<MemoryEngine>, dir: &Path) -> PublishingTrainer {
            let click = TaskSpec {
                name: "click".into(),
                main: true,
                label: TaskLabel::Action(0),
                transform: Default::default(),
                surfaces: vec![true],
                weight: 1.0,
            };
            let spec = FmSpec {
                surfaces: vec!["feed".into()],
                actions: 1,
                values: 0,
                item_ids: 0,
                item_dense: 0,
                item_optional: Vec::new(),
                features: 0,
                profile_ids: vec![],
                id_widths: Default::default(),
                content: 0,
                training_only: Default::default(),
                alignments: Default::default(),
                tasks: vec![click],
            };
            let config = FmConfig { dim: 16, qk_dim: 8, v_dim: 8, ..FmConfig::default() };
            let config = FmConfig { embedding_dim: 8, max_history: 8, ..config };
            let trainer =
                trainer::create(&dir.join("trainer"), &config, &spec, DeviceKind::Cpu).unwrap();
            let (settings, work) = (PublishSettings::default(), dir.join("published"));
            let publisher =
                Publisher::open(streams.clone(), Topic::fm("1.0.0"), settings, &work).unwrap();
            PublishingTrainer { trainer, publisher, requests: 0 }
        }

        fn publish(&mut self) {
            let outcome = Outcome { actions: 1, known: 1, ..Outcome::UNKNOWN };
            let item = Arc::new(Item { id: self.requests, ..Item::default() });
            let (ids, features, truth) = (vec![], vec![], vec![]);
            let example = Example {
                request: self.requests,
                user: Arc::new(User { id: 1, ..User::default() }),
                surface: 0,
                time_ms: 1,
                history: vec![],
                targets: vec![Target { item, ids, features, outcome, truth }],
            };
            self.trainer.step(&[&example]).unwrap();
            self.requests += 1;
            let weights = self.trainer.trained_weights("1.0.0").unwrap();
            self.publisher.publish(&weights, TrainingPosition::default()).unwrap();
        }
    }

    #[test]
    fn an_fm_whose_rows_were_cut_is_made_anew_of_what_is_published() {
        let dir = tempfile::tempdir().unwrap();
        let streams = Arc::new(MemoryEngine::default());
        let mut trained = PublishingTrainer::new(&streams, dir.path());
        trained.publish();
        let registry = RegistryClient::new(&*streams);
        registry.decide(|known| known.register_fm(&fm_version("1.0.0"))).unwrap();
        registry.decide(|known| known.promote_fm("1.0.0")).unwrap();
        let mut config = Config::default();
        config.paths.fm_work = dir.path().join("work");
        config.paths.state = dir.path().join("state");
        // The configured FM serves beside it.
        config.paths.fm = dir.path().join("fm");
        trained.trainer.checkpoint(&config.paths.fm, "0.9.0").unwrap();
        let (metrics, engine) = (Arc::new(Metrics::default()), streams.clone());
        let wasm = Engine::new(config.guests()).unwrap();
        let loader = VersionLoader::new(
            &config,
            &config.fm_serving,
            LoaderSchema::OfFm(None),
            LoaderContext { wasm, streams: engine, metrics: metrics.clone() },
        )
        .unwrap();
        let feeds = loader.feeds.clone();
        let mut updater = SetUpdater::new(loader, &config, None, &*streams).unwrap();
        let models = updater.models.clone();
        let requests = || match &*models.set().fm("1.0.0").unwrap().tier {
            FmTier::Local(batcher) => batcher.fm.current_manifest().requests,
            FmTier::Remote(_) => unreachable!("it runs here"),
        };
        let until = |is_so: &dyn Fn() -> bool, what: &str| {
            let give_up = Instant::now() + Duration::from_secs(60);
            while !is_so() {
                assert!(Instant::now() < give_up, "{what}: {:?}", models.set().lost_files());
                std::thread::sleep(Duration::from_millis(20));
            }
        };
        let following = ThreadGroup::default();
        following.spawn("weights", move |stop| feeds.follow(stop, &metrics)).unwrap();
        trained.publish();
        until(&|| requests() == 2, "a publication is applied");

        let folders = || std::fs::read_dir(dir.path().join("work/served")).unwrap();
        for is_put_back in [true, false] {
            let slab = folders().next().unwrap().unwrap().path().join("rows/rows-00000.slab");
            let content = std::fs::read(&slab).unwrap();
            std::fs::write(&slab, []).unwrap();
            assert_eq!(models.set().lost_files().len(), 1, "it is noticed");
            if is_put_back {
                std::fs::write(&slab, &content).unwrap();
                assert_eq!(models.set().lost_files(), [""; 0], "it is whole");
                let before = requests();
                trained.publish();
                until(&|| !models.set().lost_files().is_empty(), "a publication fails");
                assert_eq!(requests(), before, "the old weights stay");
            }
            updater.swap().unwrap();
            assert_eq!(models.set().lost_files(), [""; 0], "it was made anew");
            assert_eq!(requests(), trained.requests, "of all that is published");
            trained.publish();
            until(&|| requests() == trained.requests, "the next publication is applied");
            until(&|| folders().count() == 1, "the old files are removed");
        }
    }

    #[test]
    fn active_versions_and_the_fms_they_pin_must_be_loaded() {
        let active = registry(VersionState::Active);
        let loaded = Some([["feed", "1.1.0", "2.0.0"]].as_slice());
        assert_eq!(missing(&active, &["1.0.0", "2.0.0"], loaded), [""; 0]);
        let expert = "expert feed 1.1.0 on FM 2.0.0";
        assert_eq!(missing(&active, &["2.0.0"], Some(&[])), [expert]);
        assert_eq!(missing(&active, &["1.0.0"], Some(&[])), [expert, "FM 2.0.0"]);
        // The same version on another FM counts as another one.
        let repinned = Some([["feed", "1.1.0", "1.0.0"]].as_slice());
        assert_eq!(missing(&active, &["1.0.0", "2.0.0"], repinned), [expert]);
        assert_eq!(missing(&active, &["1.0.0"], None), ["FM 2.0.0"]);
        for state in [VersionState::Shadow, VersionState::Training] {
            assert_eq!(missing(&registry(state), &[], Some(&[])), [""; 0]);
        }
    }
}
