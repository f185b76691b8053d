//! The entry to rollouts: accepts pushes, reports their state, and passes commands to the
//! controller.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        mpsc::{SyncSender, sync_channel},
    },
};

use hypercast_config::Config;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{
        Rollout,
        accept::{AcceptedPush, Acceptor, files},
        controller::RolloutController,
        replay::ReplayFn,
        serving::VersionLookup,
        state::{RolloutFiles, RolloutMap},
    },
    threads::{ThreadGroup, lock},
};

/// Most commands that wait.
const COMMANDS: usize = 8;

/// The rollouts of a daemon.
pub struct RolloutService {
    all: Arc<Mutex<RolloutMap>>,
    acceptor: Arc<Acceptor>,
    commands: SyncSender<RolloutCommand>,
    threads: ThreadGroup,
}

/// What the controller works with.
pub struct RolloutContext {
    /// Accepts pushes, and loads versions after a restart. It has the schema, and the streams that
    /// hold the registry.
    pub acceptor: Arc<Acceptor>,
    /// The versions that serve.
    pub serving: Arc<dyn VersionLookup>,
    /// Runs the replay of a rollout.
    pub replay: ReplayFn,
}

/// A command to the controller, with a channel for its result.
pub(super) enum RolloutCommand {
    /// Start a rollout.
    Begin { begun: AcceptedPush, done: SyncSender<Result<()>> },
    /// Start the rollouts of pushes that were accepted and have not begun.
    BeginRecorded { done: SyncSender<Result<()>> },
    /// Give an expert's users back to the version before.
    RollBack { name: String, done: SyncSender<Result<String>> },
}

impl RolloutService {
    /// Continues the rollouts in the state folder.
    ///
    /// # Errors
    /// Files or streams cannot be read; a thread cannot be started.
    pub fn start(config: &Config, context: RolloutContext) -> Result<Self> {
        let files = RolloutFiles::open(&config.paths.state.join("rollouts"))?;
        let all = Arc::new(Mutex::new(files.read()?));
        let (commands, asked) = sync_channel(COMMANDS);
        let (threads, acceptor) = (ThreadGroup::default(), context.acceptor.clone());
        let controller =
            RolloutController::new(config, context, files, all.clone(), threads.stop.clone())?;
        threads.spawn("rollouts", move |_| controller.run(&asked))?;
        Ok(Self { all, acceptor, commands, threads })
    }

    /// Accepts a push and starts its rollout. Blocks while the component is compiled. Returns the
    /// rollout, and whether it is new.
    ///
    /// # Errors
    /// As [`Acceptor::accept`]; refused while another rollout of the expert is under way.
    pub fn push(&self, name: &str, version: &str, body: &[u8]) -> Result<(Rollout, bool)> {
        let (other, files) = self.under_way(name);
        if let Some(other) = other.filter(|other| other.version() != version) {
            return Err(Error::refused(format!(
                "the rollout of {} {} is under way ({}); wait for its end, or roll it back",
                other.name(),
                other.version(),
                other.step.word()
            )));
        }
        match self.acceptor.accept(name, version, body, files)? {
            None => {
                if self.rollout(name, version).is_none() {
                    self.send(|done| RolloutCommand::BeginRecorded { done })?;
                }
                let rollout = self.rollout(name, version);
                let gone = || {
                    Error::refused(format!(
                        "{name} {version} was pushed before, and its rollout is forgotten; sign it anew to start another one"
                    ))
                };
                Ok((rollout.ok_or_else(gone)?, false))
            }
            Some(begun) => {
                if let Some(known) = self.rollout(name, version)
                    && !known.step.is_over()
                {
                    self.acceptor.repository.begun(&begun.pending.rollout)?;
                    return Ok((known, false));
                }
                let rollout = begun.pending.rollout.clone();
                self.send(|done| RolloutCommand::Begin { begun, done })?;
                Ok((rollout, true))
            }
        }
    }

    /// The rollout of an expert that is under way, and the files of all that are.
    fn under_way(&self, name: &str) -> (Option<Rollout>, HashSet<PathBuf>) {
        let all = lock(&self.all);
        let under_way = || all.values().filter(|rollout| rollout.is_under_way());
        let files = under_way().flat_map(|rollout| files(&rollout.expert)).collect();
        (under_way().find(|rollout| rollout.name() == name).cloned(), files)
    }

    /// The rollout of a version, if it was pushed to this daemon.
    pub fn rollout(&self, name: &str, version: &str) -> Option<Rollout> {
        lock(&self.all).get(&(name.to_owned(), version.to_owned())).cloned()
    }

    /// The rollouts of an expert, the newest last.
    pub fn of(&self, name: &str) -> Vec<Rollout> {
        let mut own: Vec<Rollout> =
            lock(&self.all).values().filter(|rollout| rollout.name() == name).cloned().collect();
        own.sort_by_key(|rollout| rollout.begun_ms);
        own
    }

    /// Gives an expert's users back to the version before: ends a rollout that is under way, or
    /// undoes the last promotion. Blocks. Returns what was done, in words.
    ///
    /// # Errors
    /// Refused: there is no version before.
    pub fn roll_back(&self, name: &str) -> Result<String> {
        self.send(|done| RolloutCommand::RollBack { name: name.to_owned(), done })
    }

    /// Stops the controller after its current step; rollouts continue at the next start.
    pub fn stop(&self) {
        self.threads.stop();
    }

    fn send<T>(&self, command: impl FnOnce(SyncSender<Result<T>>) -> RolloutCommand) -> Result<T> {
        let (done, outcome) = sync_channel(1);
        let ended = || Error::internal("the rollout controller has stopped; see the daemon's log");
        self.commands
            .try_send(command(done))
            .map_err(|_| Error::unreachable("too many commands are waiting; try again"))?;
        outcome.recv().map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::Path,
        time::{Duration, Instant},
    };

    use hypercast_core::shutdown::Shutdown;
    use hypercast_data::schema::Schema;
    use hypercast_expert::{
        Blueprint, BreakerConfig, Device, Engine, EngineConfig, FeatureStatistics, Limits,
        LoadOptions, ServedExpert, wasm::contract::Slice,
    };
    use hypercast_stream::{
        registry::{Change, Registry, RegistryFollower, VersionState, WeightsLocation},
        streams::{MemoryEngine, StreamEngine as Streams},
    };

    use super::*;
    use crate::fixtures;
    use crate::rollout::{
        PolicyOverrides, PushManifest, RolloutStep,
        replay::{ReplayInput, ReplayVerdict},
        repository::{PendingRollout, Repository},
        transitions,
    };
    use crate::versions::{
        desired_set::DesiredExpert,
        serving_set::{ExpertArm, LiveExpert},
    };

    /// Serves nothing: rollouts alone are tested.
    struct Nothing;

    impl VersionLookup for Nothing {
        fn arm(&self, _: &str, _: &str) -> Option<Arc<ExpertArm>> {
            None
        }

        fn problem(&self) -> Option<String> {
            None
        }

        fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<Slice> {
            Vec::new()
        }
    }

    /// A rollout at its replay step, as its file has it after a restart.
    fn at_replay() -> Rollout {
        fixtures::rollout(fixtures::expert_version("feed", "1.0.0"))
    }

    /// Runs until it is cancelled, as a replay over many requests would for minutes.
    fn slow(_: &ReplayInput, cancelled: &Shutdown) -> Result<ReplayVerdict> {
        let start = Instant::now();
        while !cancelled.is_requested() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(ReplayVerdict::Passed(String::new()))
    }

    /// The rollouts of a daemon whose state is in `dir`, and whose replays are `replay`.
    fn started(dir: &Path, replay: ReplayFn) -> RolloutService {
        let streams = Arc::new(MemoryEngine::new(16));
        started_with(dir, streams, Arc::new(Nothing), replay)
    }

    fn started_with(
        dir: &Path,
        streams: Arc<dyn Streams>,
        serving: Arc<dyn VersionLookup>,
        replay: ReplayFn,
    ) -> RolloutService {
        let mut config = Config::without_folder();
        config.paths.state = dir.to_path_buf();
        config.paths.experts = dir.join("experts");
        let schema: Arc<Schema> =
            Arc::new(toml::from_str("surfaces = ['feed']\nactions = []\ntasks = []").unwrap());
        let wasm = Engine::new(config.guests()).unwrap();
        let trusted = Box::new(|| Ok(Vec::new()));
        let acceptor = Acceptor::new(&config, trusted, schema, wasm, streams).unwrap();
        let context = RolloutContext { acceptor: Arc::new(acceptor), serving, replay };
        RolloutService::start(&config, context).unwrap()
    }

    fn wait_for(what: &str, seen: impl Fn() -> bool) {
        let start = Instant::now();
        while !seen() {
            assert!(start.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_rollback_is_answered_while_a_replay_runs() {
        use std::sync::atomic::{AtomicBool, Ordering};
        static RUNS: AtomicBool = AtomicBool::new(false);
        static ENDED: AtomicBool = AtomicBool::new(false);
        fn replay(input: &ReplayInput, cancelled: &Shutdown) -> Result<ReplayVerdict> {
            RUNS.store(true, Ordering::Relaxed);
            let verdict = slow(input, cancelled);
            ENDED.store(true, Ordering::Relaxed);
            verdict
        }
        let dir = tempfile::tempdir().unwrap();
        let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
        files.write(&at_replay()).unwrap();
        let rollouts = started(dir.path(), replay);
        wait_for("the replay runs", || RUNS.load(Ordering::Relaxed));
        let start = Instant::now();
        let done = rollouts.roll_back("feed").unwrap();
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        assert!(done.contains("no version of feed answers"), "{done}");
        let rollout = rollouts.rollout("feed", "1.0.0").unwrap();
        assert_eq!(rollout.step, RolloutStep::Failed);
        assert_eq!(rollout.cause.as_deref(), Some("asked to"));
        wait_for("the replay is cancelled", || ENDED.load(Ordering::Relaxed));
    }

    #[test]
    fn the_verdict_of_a_replay_decides_the_next_step() {
        fn failing(_: &ReplayInput, _: &Shutdown) -> Result<ReplayVerdict> {
            Ok(ReplayVerdict::Failed("replay: it faulted".into()))
        }
        let dir = tempfile::tempdir().unwrap();
        let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
        files.write(&at_replay()).unwrap();
        let rollouts = started(dir.path(), failing);
        let rollout = || rollouts.rollout("feed", "1.0.0").unwrap();
        wait_for("the rollout ends", || rollout().step == RolloutStep::Failed);
        assert_eq!(rollout().cause.as_deref(), Some("replay: it faulted"));
    }

    #[test]
    fn a_push_that_was_accepted_before_the_process_was_killed_begins_its_rollout_once() {
        let dir = tempfile::tempdir().unwrap();
        let record = || {
            // What a process leaves behind that was killed after it accepted a push.
            let repository = Repository::open(&dir.path().join("experts/pushed")).unwrap();
            let pending = PendingRollout { rollout: at_replay(), adoption: Vec::new() };
            let manifest = PushManifest {
                name: "feed".into(),
                version: "1.0.0".into(),
                contract: "2.0.0".into(),
                surfaces: Vec::new(),
                fm: None,
                component: "ab".into(),
                parameters: None,
                created_ms: 1,
                audience: None,
                expires_ms: None,
                policy: PolicyOverrides::default(),
            };
            repository.remember(&manifest, pending).unwrap();
            repository
        };
        let repository = record();
        let rollouts = started(dir.path(), slow);
        wait_for("it begins", || rollouts.rollout("feed", "1.0.0").is_some());
        assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::Replay);
        wait_for("that is noted", || repository.pending().unwrap().is_empty());
        drop(rollouts);
        // Killed a moment later: the rollout has a file, and that is not noted yet.
        let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
        let failed = Rollout { step: RolloutStep::Failed, settled: true, ..at_replay() };
        files.write(&failed).unwrap();
        let repository = record();
        let rollouts = started(dir.path(), slow);
        wait_for("that is noted", || repository.pending().unwrap().is_empty());
        assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::Failed);
    }

    #[test]
    fn another_process_accepts_no_push_for_the_same_folder() {
        let dir = tempfile::tempdir().unwrap();
        let first = Repository::open(dir.path()).unwrap();
        first.own().unwrap();
        first.own().unwrap();
        let second = Repository::open(dir.path()).unwrap();
        let why = second.own().unwrap_err().to_string();
        assert!(why.contains("another daemon accepts pushes"), "{why}");
        drop(first);
        second.own().unwrap();
    }

    /// Serves one version to everybody, whose `evaluate` runs until its deadline.
    struct Spinning(Arc<ExpertArm>);

    impl VersionLookup for Spinning {
        fn arm(&self, _: &str, version: &str) -> Option<Arc<ExpertArm>> {
            (version == "1.0.0").then(|| self.0.clone())
        }

        fn problem(&self) -> Option<String> {
            None
        }

        fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<Slice> {
            Vec::new()
        }
    }

    /// The deadline of a guest's `evaluate`, in milliseconds.
    const SPINS_MS: u32 = 20_000;

    /// A loaded version of a guest whose `evaluate` never returns.
    fn spinning(component: &Path) -> ExpertArm {
        let schema = hypercast_data::import::simulate::schema(1);
        let engine = Engine::new(EngineConfig::default()).unwrap();
        let limits = Limits { hook_deadline_ms: SPINS_MS, ..Limits::default() };
        let options = LoadOptions { limits, tae_dim: 4, ..LoadOptions::default() };
        let blueprint = Blueprint::load(&engine, component, &schema, &options).unwrap();
        let names = blueprint.columns.feature_names().to_vec();
        let parameters = blueprint.init_parameters(FeatureStatistics::new(&names).finish(), 0);
        let (device, breaker) = (Device::Cpu, BreakerConfig::default());
        let expert = ServedExpert::new(Arc::new(blueprint), parameters, device, breaker).unwrap();
        let desired = DesiredExpert {
            name: "feed".into(),
            version: Some("1.0.0".into()),
            plugin: component.to_path_buf(),
            plugin_hash: None,
            sha256: None,
            weights: WeightsLocation::Published,
            fm: None,
            without_tae: false,
            surfaces: vec![0],
            state: VersionState::Active,
            share: 1.0,
            content: None,
        };
        ExpertArm {
            name: "feed".into(),
            version: "1.0.0".into(),
            label: "feed@1.0.0".into(),
            fm: "1.0.0".into(),
            share: 1.0,
            live: Arc::new(LiveExpert::new(expert)),
            desired,
        }
    }

    #[test]
    fn a_rollback_is_answered_while_evaluate_runs() {
        let Some(component) = hypercast_core::prerequisite::hostile("evaluate", "spin_evaluate")
        else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let streams: Arc<dyn Streams> = Arc::new(MemoryEngine::new(16));
        let version = fixtures::expert_version("feed", "1.0.0");
        let mut follower = RegistryFollower::new(&*streams).unwrap();
        let fm = fixtures::fm_version("1.0.0");
        let mut decide = |of: &dyn Fn(&Registry) -> Result<Vec<Change>>| {
            assert!(follower.decide(&*streams, of).unwrap());
        };
        decide(&|registry| Ok(registry.register_fm(&fm)?));
        decide(&|registry| Ok(registry.promote_fm("1.0.0")?));
        decide(&|registry| transitions::shadow(registry, &version));
        decide(&|registry| transitions::promote(registry, &version, 1.0, false));
        let promoted = Rollout {
            step: RolloutStep::Promoted,
            since_ms: hypercast_core::clock::now_ms(),
            ..fixtures::rollout(version.clone())
        };
        let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
        files.write(&promoted).unwrap();
        let arm = Arc::new(spinning(&component));
        let serving = Arc::new(Spinning(arm.clone()));
        let rollouts = started_with(dir.path(), streams.clone(), serving, slow);
        let plugin = || arm.expert().blueprint().plugin.usage().instances.calls;
        let at_load = plugin();
        wait_for("`evaluate` runs", || plugin() > at_load);
        let start = Instant::now();
        let done = rollouts.roll_back("feed").unwrap();
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert!(done.contains("no version of feed answers"), "{done}");
        assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::RolledBack);
    }
}
