//! Follows the registry's decisions and the stream of outcomes. New versions are loaded here, off
//! the path of requests. If one cannot be loaded, the old set keeps serving and the reason is
//! reported.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    time::{Duration, Instant},
};

use hypercast_config::Config;
use hypercast_core::{clock::now_ms, shutdown::Shutdown};
use hypercast_data::schema::Schema;
use hypercast_fm::priority::lower_thread_priority;
use hypercast_stream::{
    join::{OutcomeRecord, StateUpdate},
    registry::{ExpertVersion, Registry, RegistryFollower, VersionState},
    streams::{StreamEngine, Topic},
};
use prometheus::IntGauge;

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::Metrics,
    request::service::RankingService,
    threads::{ThreadGroup, lock},
    versions::{
        desired_set::{DesiredSet, ExpertFileHashes, expert_file_hashes},
        loader::VersionLoader,
        serving_set::ServingModels,
    },
};

/// How long a read of a stream waits for new records.
const WAIT: Duration = Duration::from_millis(200);

/// Back-off after a stream failed.
const REST: Duration = Duration::from_secs(1);

/// How often versions that could not be loaded are tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Most records in one read.
const MOST: usize = 4096;

/// Turns registry decisions into serving sets.
pub struct SetUpdater {
    config: Config,
    /// Of the configured experts.
    expert_file_hashes: ExpertFileHashes,
    schema: Option<Arc<Schema>>,
    loader: VersionLoader,
    follower: RegistryFollower,
    /// The set that was last loaded.
    plan: DesiredSet,
    /// Counts the decisions that the registry misses.
    unapplied: IntGauge,
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
        let unapplied = loader.metrics.gauge(
            "hypercast_registry_unapplied_decisions",
            "Decisions of the registry that this version of hypercast cannot apply or its stream has lost; it decides nothing meanwhile",
        );
        let updater = SetUpdater {
            config: config.clone(),
            expert_file_hashes,
            schema,
            loader,
            follower,
            plan,
            unapplied,
            models,
        };
        updater.report_missing();
        Ok(updater)
    }

    /// Starts the threads that follow weights, versions and, if there is a service, outcomes.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn start(
        self,
        streams: Arc<dyn StreamEngine>,
        metrics: Arc<Metrics>,
        service: Option<Arc<RankingService>>,
    ) -> Result<FollowThreads> {
        let (asks, asked) = sync_channel(1);
        let following = FollowThreads { threads: ThreadGroup::default(), asks };
        let feeds = self.loader.feeds.clone();
        following.threads.spawn("weights", move |stop| {
            lower_thread_priority();
            feeds.follow(stop, &metrics);
        })?;
        let registry = streams.clone();
        following.threads.spawn("versions", move |stop| self.follow(&*registry, stop, &asked))?;
        if let Some(service) = service {
            following
                .threads
                .spawn("outcomes", move |stop| follow_outcomes(&*streams, &service, stop))?;
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
                Ok(false) if self.models.problem().is_some() && tried.elapsed() > RETRY => {
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

    /// Serves another configuration's experts, or keeps the old ones.
    fn reload(&mut self, config: Config) -> Result<bool> {
        // Requests of more candidates need more memory.
        for arm in &self.models.set().arms {
            let limits = config.load_options(&arm.name).graph_limits;
            arm.expert().blueprint().check_memory(&limits)?;
        }
        self.loader.config.server.max_candidates = config.server.max_candidates;
        let expert_file_hashes = expert_file_hashes(&config);
        if self.schema.is_none()
            || (config.experts == self.config.experts
                && expert_file_hashes == self.expert_file_hashes)
        {
            return Ok(false);
        }
        let before = (
            std::mem::replace(&mut self.config, config),
            std::mem::replace(&mut self.expert_file_hashes, expert_file_hashes),
        );
        let served = self.models.set();
        if let Err(error) = self.swap() {
            (self.config, self.expert_file_hashes) = before;
            return Err(error);
        }
        self.report_missing();
        Ok(!Arc::ptr_eq(&served, &self.models.set()))
    }

    fn swap(&mut self) -> Result<()> {
        let registry = self.follower.registry();
        let (schema, hashes) = (self.schema.as_deref(), &self.expert_file_hashes);
        let plan = DesiredSet::new(&self.config, schema, registry, hashes)?;
        // Versions that are only in training change nothing here.
        if plan == self.plan && self.models.problem().is_none() {
            return Ok(());
        }
        let old = self.models.set();
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
        self.unapplied.set(registry.unapplied().map_or(0, |unapplied| unapplied.count as i64));
        *lock(&self.models.missing) = missing;
    }

    fn report(&self, outcome: Result<()>) {
        self.report_missing();
        if let Err(error) = outcome {
            tracing::error!(%error, "a change of versions cannot be served; the versions before keep serving");
            *lock(&self.models.problem) = Some(error.to_string());
        }
    }
}

/// The threads that follow; dropping it stops them.
pub struct FollowThreads {
    threads: ThreadGroup,
    asks: SyncSender<ReloadRequest>,
}

/// Another configuration, with a channel for the result.
struct ReloadRequest {
    config: Config,
    done: SyncSender<Result<bool>>,
}

impl FollowThreads {
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

/// Follows outcomes until `stop`, and tries again while the stream cannot be read.
fn follow_outcomes(streams: &dyn StreamEngine, service: &RankingService, stop: &Shutdown) {
    while !stop.is_requested() {
        if let Err(error) = compare_outcomes(streams, service, stop) {
            tracing::warn!(%error, "outcomes cannot be read; trying again");
            std::thread::sleep(REST);
        }
    }
}

/// Compares outcomes with predictions from the stream's end on, because this process has no
/// predictions for older ones.
fn compare_outcomes(
    streams: &dyn StreamEngine,
    service: &RankingService,
    stop: &Shutdown,
) -> Result<()> {
    let topic = Topic::outcomes();
    let mut reader = streams.reader(&topic, streams.span(&topic)?.end)?;
    while !stop.is_requested() {
        let (records, now) = (reader.next(MOST, WAIT)?, now_ms());
        for stored in records {
            match OutcomeRecord::decode(&stored.payload).map(|outcome| outcome.update) {
                Ok(StateUpdate::Outcome(impression)) => {
                    service.predictions.outcome(&impression, &service.converter.schema, now);
                }
                // A correction is ignored, because the outcome was compared when it first became
                // known.
                Ok(StateUpdate::Corrected(_) | StateUpdate::Item(_) | StateUpdate::User(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, position = stored.position, "an outcome cannot be read");
                }
            }
        }
    }
    Ok(())
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
    use crate::fixtures::expert_version;
    use hypercast_stream::registry::{Change, Decision};

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
