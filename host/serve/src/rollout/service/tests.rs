use std::{
    path::Path,
    time::{Duration, Instant},
};

use hypercast_config::ExpertLimits;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, BreakerConfig, Device, Engine, EngineConfig, FeatureStatistics, Limits, LoadOptions,
    ServedExpert, wasm::contract::Slice,
};
use hypercast_stream::{
    registry::{Change, Registry, RegistryFollower, VersionState, WeightsLocation},
    streams::{MemoryEngine, Record, StreamEngine as Streams, Topic},
};

use super::*;
use crate::fixtures;
use crate::http::reload::Settings;
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
    let settings = Arc::new(Settings::new(config.clone()));
    let acceptor = Acceptor::new(settings, schema, wasm, streams).unwrap();
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

/// What a process leaves behind that was killed after it accepted a push.
fn recorded(dir: &Path, rollout: Rollout, expires_ms: Option<i64>) -> Repository {
    let repository = Repository::open(&dir.join("experts/pushed")).unwrap();
    let manifest = PushManifest {
        name: rollout.name().into(),
        version: rollout.version().into(),
        contract: "2.0.0".into(),
        surfaces: Vec::new(),
        fm: None,
        component: "ab".into(),
        parameters: None,
        created_ms: rollout.created_ms,
        audience: None,
        expires_ms,
        policy: PolicyOverrides::default(),
    };
    let pending = PendingRollout { rollout, adoption: Vec::new(), expires_ms };
    repository.remember(&manifest, pending).unwrap();
    repository
}

#[test]
fn a_push_that_was_accepted_before_the_process_was_killed_begins_its_rollout_once() {
    let dir = tempfile::tempdir().unwrap();
    let record = || recorded(dir.path(), at_replay(), None);
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

/// Streams with a registry in which version 1.0.0 of the expert `feed` answers everybody.
fn serving_feed() -> Arc<dyn Streams> {
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
    streams
}

#[test]
fn a_recorded_push_is_given_up_if_another_version_serves_or_its_signature_has_ended() {
    let second = || fixtures::rollout(fixtures::expert_version("feed", "2.0.0"));
    let replaces =
        |previous: Option<&str>| Rollout { previous: previous.map(str::to_owned), ..second() };
    let far_ms = hypercast_core::clock::now_ms() + 3_600_000;
    for (rollout, expires_ms, cause) in [
        (replaces(Some("1.0.0")), Some(far_ms), None),
        (replaces(Some("1.0.0")), None, None),
        (replaces(Some("1.0.0")), Some(1000), Some("the signature expired at 1000")),
        (replaces(Some("0.9.0")), None, Some("1.0.0 serves now")),
        (replaces(None), None, Some("accepted while no version did")),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let repository = recorded(dir.path(), rollout, expires_ms);
        let rollouts = started_with(dir.path(), serving_feed(), Arc::new(Nothing), slow);
        wait_for("it is decided", || repository.pending().unwrap().is_empty());
        let rollout = rollouts.rollout("feed", "2.0.0").unwrap();
        let Some(cause) = cause else {
            assert_eq!(rollout.step, RolloutStep::Replay, "{rollout:?}");
            continue;
        };
        assert_eq!((rollout.step, rollout.settled), (RolloutStep::Failed, true));
        let found = rollout.cause.as_deref().unwrap_or_default();
        assert!(found.contains(cause), "{found}");
        let line = &rollout.log.last().unwrap().text;
        assert!(line.contains("before it began") && line.contains(cause), "{line}");
    }
}

#[test]
fn a_recorded_push_that_cannot_begin_waits_and_a_rollback_cancels_it() {
    let streams = serving_feed();
    // A decision that this version does not know: nothing can be decided.
    let unknown = r#"{"at_ms":1,"changes":[{"change":"sold","name":"feed"}]}"#;
    let record = Record { id: 0, payload: unknown.into() };
    streams.appender(&Topic::versions()).unwrap().append(&[record]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let second = fixtures::rollout(fixtures::expert_version("feed", "2.0.0"));
    let second = Rollout { previous: Some("1.0.0".into()), ..second };
    let repository = recorded(dir.path(), second.clone(), None);
    let rollouts = started_with(dir.path(), streams, Arc::new(Nothing), slow);
    // A command is answered after the first attempt.
    assert!(rollouts.roll_back("search").is_err());
    assert_eq!(repository.pending().unwrap().len(), 1);
    assert!(rollouts.rollout("feed", "2.0.0").is_none());
    let done = rollouts.roll_back("feed").unwrap();
    assert!(done.contains("1.0.0 (100 %)"), "{done}");
    assert_eq!(repository.pending().unwrap(), []);
    let rollout = rollouts.rollout("feed", "2.0.0").unwrap();
    assert_eq!((rollout.step, rollout.cause.as_deref()), (RolloutStep::Failed, Some("asked to")));
}

#[test]
fn a_recorded_push_begins_once_the_daemon_that_held_the_folder_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let first = recorded(dir.path(), at_replay(), None);
    first.own().unwrap();
    let rollouts = started(dir.path(), slow);
    // A command is answered after the first attempt.
    assert!(rollouts.roll_back("search").is_err());
    assert!(rollouts.rollout("feed", "1.0.0").is_none());
    drop(first);
    wait_for("it begins", || rollouts.rollout("feed", "1.0.0").is_some());
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
        limits: ExpertLimits::default(),
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
    let Some(component) = hypercast_core::prerequisite::hostile("evaluate", "spin_evaluate") else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let (streams, version) = (serving_feed(), fixtures::expert_version("feed", "1.0.0"));
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
