use std::{
    path::Path,
    time::{Duration, Instant},
};

use hypercast_config::ExpertLimits;
use hypercast_core::shutdown::Shutdown;
use hypercast_data::schema::Schema;
use hypercast_expert::{
    Blueprint, BreakerConfig, Device, Engine, EngineConfig, FeatureStatistics, Limits, LoadOptions,
    ServedExpert,
};
use hypercast_stream::{
    registry::{Change, Registry, RegistryFollower, VersionState, WeightsLocation},
    streams::{MemoryEngine, Record, StreamEngine as Streams, Topic},
};

mod steps;

use super::*;
use crate::fixtures;
use crate::http::reload::Settings;
use crate::rollout::{
    MeasuredSlice, PolicyOverrides, PushManifest, RolloutStep,
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

    fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<MeasuredSlice> {
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
    let (config, context) = context(dir, streams, serving, replay);
    RolloutService::start(&config, context).unwrap()
}

fn context(
    dir: &Path,
    streams: Arc<dyn Streams>,
    serving: Arc<dyn VersionLookup>,
    replay: ReplayFn,
) -> (Config, RolloutContext) {
    let mut config = Config::without_folder();
    config.paths.state = dir.to_path_buf();
    config.paths.experts = dir.join("experts");
    let schema: Arc<Schema> =
        Arc::new(toml::from_str("surfaces = ['feed']\nactions = []\ntasks = []").unwrap());
    let wasm = Engine::new(config.guests()).unwrap();
    let settings = Arc::new(Settings::new(config.clone()));
    let acceptor = Acceptor::new(settings, schema, wasm, streams).unwrap();
    (config, RolloutContext { acceptor: Arc::new(acceptor), serving, replay })
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

/// The same, with a decision that this version does not know: nothing can be decided.
fn undecidable() -> Arc<dyn Streams> {
    let streams = serving_feed();
    let unknown = r#"{"at_ms":1,"changes":[{"change":"sold","name":"feed"}]}"#;
    let record = Record { id: 0, payload: unknown.into() };
    streams.appender(&Topic::versions()).unwrap().append(&[record]).unwrap();
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
    let dir = tempfile::tempdir().unwrap();
    let second = fixtures::rollout(fixtures::expert_version("feed", "2.0.0"));
    let second = Rollout { previous: Some("1.0.0".into()), ..second };
    let repository = recorded(dir.path(), second.clone(), None);
    let rollouts = started_with(dir.path(), undecidable(), Arc::new(Nothing), slow);
    // A command is answered after the first attempt.
    assert!(rollouts.roll_back("search").is_err());
    assert_eq!(repository.pending().unwrap().len(), 1);
    assert!(rollouts.rollout("feed", "2.0.0").is_none());
    let done = rollouts.roll_back("feed").unwrap();
    assert!(done.contains("feed@2.0.0 (not begun)"), "{done}");
    assert!(done.contains("1.0.0 (100 %)"), "{done}");
    assert_eq!(repository.pending().unwrap(), []);
    let rollout = rollouts.rollout("feed", "2.0.0").unwrap();
    assert_eq!((rollout.step, rollout.cause.as_deref()), (RolloutStep::Failed, Some("asked to")));
}

/// Version 1.0.0 of `feed`, which answers everybody and is watched.
fn watched() -> Rollout {
    let since_ms = hypercast_core::clock::now_ms();
    Rollout { step: RolloutStep::Promoted, since_ms, ..at_replay() }
}

#[test]
fn one_rollback_ends_the_active_rollout_and_the_recorded_one() {
    let dir = tempfile::tempdir().unwrap();
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    files.write(&watched()).unwrap();
    let rollouts = started_with(dir.path(), serving_feed(), Arc::new(Nothing), slow);
    // A command is answered after the first attempt to begin recorded rollouts.
    assert!(rollouts.roll_back("search").is_err());
    let second = fixtures::rollout(fixtures::expert_version("feed", "2.0.0"));
    let second = Rollout { previous: Some("1.0.0".into()), ..second };
    let repository = recorded(dir.path(), second, None);
    let done = rollouts.roll_back("feed").unwrap();
    for part in ["feed@1.0.0 (promoted)", "feed@2.0.0 (not begun)", "no version of feed answers"] {
        assert!(done.contains(part), "{part}: {done}");
    }
    assert_eq!(repository.pending().unwrap(), []);
    let ended = |version| {
        let rollout = rollouts.rollout("feed", version).unwrap();
        (rollout.step, rollout.cause.unwrap_or_default())
    };
    assert_eq!(ended("1.0.0"), (RolloutStep::RolledBack, "asked to".into()));
    assert_eq!(ended("2.0.0"), (RolloutStep::Failed, "asked to".into()));
}

#[test]
fn a_rollback_that_ends_one_rollout_of_two_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    files.write(&watched()).unwrap();
    let second = fixtures::rollout(fixtures::expert_version("feed", "2.0.0"));
    let repository = recorded(dir.path(), second, None);
    // Nothing can be decided, so that 1.0.0 goes on.
    let rollouts = started_with(dir.path(), undecidable(), Arc::new(Nothing), slow);
    let why = rollouts.roll_back("feed").unwrap_err().to_string();
    assert!(why.contains("ended the rollout of feed@2.0.0 (not begun), but not all"), "{why}");
    assert_eq!(repository.pending().unwrap(), []);
    assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::Promoted);
}

#[test]
fn a_rollout_that_has_begun_is_ended_as_such_although_that_was_not_noted() {
    let dir = tempfile::tempdir().unwrap();
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    files.write(&watched()).unwrap();
    let rollouts = started_with(dir.path(), serving_feed(), Arc::new(Nothing), slow);
    assert!(rollouts.roll_back("search").is_err());
    recorded(dir.path(), at_replay(), None);
    let done = rollouts.roll_back("feed").unwrap();
    assert!(done.contains("feed@1.0.0 (promoted)") && !done.contains("not begun"), "{done}");
    assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::RolledBack);
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

/// Keeps the warnings and errors of its thread.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }

    fn event(&self, event: &tracing::Event<'_>) {
        struct Text(String);
        impl tracing::field::Visit for Text {
            fn record_debug(&mut self, _: &tracing::field::Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!("{value:?} ");
            }
        }
        let mut text = Text(String::new());
        event.record(&mut text);
        lock(&self.0).push(text.0);
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn that_another_daemon_has_the_folder_of_pushes_is_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let first = recorded(dir.path(), at_replay(), None);
    first.own().unwrap();
    let streams = Arc::new(MemoryEngine::new(16));
    let (config, context) = context(dir.path(), streams, Arc::new(Nothing), slow);
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    let (all, stop) = (Arc::default(), Shutdown::default());
    let mut controller = RolloutController::new(&config, context, files, all, stop).unwrap();
    let warnings = Warnings::default();
    let told = || std::mem::take(&mut *lock(&warnings.0));
    tracing::subscriber::with_default(warnings.clone(), || {
        let mut attempts = |count: u64| {
            for attempt in 1..=count {
                controller.begin_due(Instant::now() + Duration::from_secs(attempt * 10));
            }
            told()
        };
        let first_told = attempts(20);
        assert_eq!(first_told.len(), 1, "{first_told:?}");
        let why = &first_told[0];
        let folder = dir.path().join("experts/pushed");
        let folder = folder.canonicalize().unwrap().display().to_string();
        let holder = format!("process {} works here", std::process::id());
        assert!(why.contains(&folder) && why.contains(&holder), "{why}");
        // Another failure is told, too.
        std::fs::rename(dir.path().join("experts"), dir.path().join("moved")).unwrap();
        let other = attempts(20);
        assert_eq!(other.len(), 1, "{other:?}");
        assert!(other[0].contains("No such file"), "{other:?}");
    });
    drop(first);
}

/// A list of pushes as it was written before recorded rollouts had an end.
const WITHOUT_END: &str = r#"{
  "format": 1,
  "newest_ms": 1795868914435,
  "versions": {
    "1.1.0": {
      "created_ms": 1795868914435,
      "component": "e232cd923c5bafd0720bfe70b17dca272b81f6a15b5d401d5e72a07a0492bb2a",
      "parameters": "2124276a8878b68419df2e102df71abb29808a9b4673a042b5f60ef0c0f84e09"
    }
  },
  "pending": {
    "rollout": {
      "expert": {
        "name": "home", "version": "1.1.0", "state": "training", "parent": null,
        "plugin": "/experts/pushed/objects/e232.wasm", "plugin_hash": "d3e289cec1812005",
        "sha256": { "component": "e232", "parameters": "2124" },
        "plugin_version": "0.1.0", "accepts_fm": "*", "fm": "1.0.0",
        "schema": "f5389e787770f3e9", "tae_dim": 16, "without_tae": false,
        "surfaces": ["feed", "search"], "created_ms": 1795868915161, "trained_ms": 0,
        "weights": { "path": "/experts/pushed/objects/2124.safetensors" }
      },
      "key": "5e4784f02b671b14", "created_ms": 1795868914435, "begun_ms": 1795868914901,
      "step": "replay", "since_ms": 1795868914901, "previous": null, "displaced": [],
      "limits": {
        "stop_after": "never", "replay_requests": 20, "shadow_requests": 10,
        "canary_share": 0.5, "canary_requests": 10, "canary_s": 0, "step_most_s": 3600,
        "fault_share": 0.01, "latency_factor": 1.5, "latency_slack_ms": 10000.0,
        "window_s": 60, "watch_s": 900, "replace": false
      },
      "before_us": null, "settled": false, "cause": null,
      "log": [{ "at_ms": 1795868914901, "step": "replay", "text": "signed by key 5e47" }]
    },
    "adoption": []
  }
}"#;

#[test]
fn a_rollout_that_was_recorded_without_an_end_begins() {
    let dir = tempfile::tempdir().unwrap();
    let names = dir.path().join("experts/pushed/names");
    std::fs::create_dir_all(&names).unwrap();
    std::fs::write(names.join("home.json"), WITHOUT_END).unwrap();
    let repository = Repository::open(&dir.path().join("experts/pushed")).unwrap();
    let pending = repository.pending().unwrap();
    assert_eq!(pending.len(), 1);
    assert_eq!((pending[0].expires_ms, &*pending[0].adoption), (None, &[][..]));
    let rollouts = started(dir.path(), slow);
    wait_for("it begins", || repository.pending().unwrap().is_empty());
    let begun = rollouts.rollout("home", "1.1.0").unwrap();
    assert_eq!((begun.step, begun.cause), (RolloutStep::Replay, None));
    assert_eq!(begun.log, pending[0].rollout.log);
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

    fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<MeasuredSlice> {
        Vec::new()
    }
}

/// The deadline of a guest's `evaluate`, in milliseconds.
const SPINS_MS: u32 = 20_000;

/// A loaded version of a guest whose `evaluate` never returns.
fn spinning(component: &Path) -> ExpertArm {
    let schema = hypercast_data::simulate::schema(1);
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
    let files = RolloutFiles::open(&dir.path().join("rollouts")).unwrap();
    files.write(&watched()).unwrap();
    let arm = Arc::new(spinning(&component));
    let serving = Arc::new(Spinning(arm.clone()));
    let rollouts = started_with(dir.path(), serving_feed(), serving, slow);
    let plugin = || arm.expert().blueprint().plugin.usage().instances.calls;
    let at_load = plugin();
    wait_for("`evaluate` runs", || plugin() > at_load);
    let start = Instant::now();
    let done = rollouts.roll_back("feed").unwrap();
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    assert!(done.contains("no version of feed answers"), "{done}");
    assert_eq!(rollouts.rollout("feed", "1.0.0").unwrap().step, RolloutStep::RolledBack);
}
