//! Daemons with experts: each takes the pushes of one expert and brings its versions to all users,
//! with the host's own rollouts. What a guest would do is made up: whether a version loads, its
//! faults, its times, and what its `evaluate` says.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use hypercast_config::{Config, RolloutSettings};
use hypercast_core::{clock, entropy, error::ErrorKind};
use hypercast_expert::{Engine, EngineConfig, wasm::contract::Verdict};
use hypercast_serve::{
    Error, Result,
    rollout::{
        Acceptor, ArmStats, MeasuredArm, MeasuredSlice, ReplayVerdict, Rollout, RolloutContext,
        RolloutService, RolloutStep, VersionLookup,
        accept::{KeptFiles, LoadedPush, PushToLoad},
    },
    versions::{
        desired_set::{DesiredExpert, DesiredSet},
        serving_set::ExpertArm,
    },
};
use hypercast_stream::{
    registry::{
        Change, ExpertVersion, FmVersion, Promotion, Registry, RegistryFollower, VersionState,
        WeightsLocation, choose_version, user_bucket,
    },
    streams::StreamEngine,
};

use crate::{
    installation::dataset,
    plan::Role,
    plant::Plant,
    pushes::{self, PushCall, PushedKind},
    rollout_oracles::PushAnswer,
    versions::simulated_fm,
    world::{Due, Simulation, Stepped},
};

/// Requests of an expert's users, in a second.
const REQUESTS_A_S: f64 = 2.0;

/// The most requests that a step answers.
const MOST_REQUESTS: u64 = 60;

/// How long a version whose `evaluate` holds it is held.
const HELD: Duration = Duration::from_secs(20);

/// One step in so many has an operator do something.
const OPERATOR_ACTS: u64 = 200;

/// The limits of rollouts, small enough that a run sees several from their begin to their end.
pub fn settings() -> RolloutSettings {
    RolloutSettings {
        trusted_keys: vec![pushes::key().public().text()],
        shadow_requests: 7,
        canary_share: 0.4,
        canary_requests: 8,
        canary_s: 5,
        step_most_s: 60,
        fault_share: 0.2,
        window_s: 10,
        watch_s: 15,
        ..RolloutSettings::default()
    }
}

/// The engine of guests, which compiles none here. It is made on the real machine.
pub fn wasm() -> &'static Engine {
    static WASM: OnceLock<Engine> = OnceLock::new();
    WASM.get_or_init(|| Engine::new(EngineConfig::default()).expect("room for an engine"))
}

/// One life of a daemon with experts.
pub struct ExpertDaemon {
    role: Role,
    /// The expert whose pushes it takes.
    name: &'static str,
    engine: Arc<dyn StreamEngine>,
    config: Config,
    /// Its rollouts.
    pub service: RolloutService,
    arms: Arc<SimulatedArms>,
    asked: Instant,
}

impl ExpertDaemon {
    /// Starts the daemon of a role.
    ///
    /// # Errors
    /// What it would say before it ends.
    pub fn open(
        mut config: Config,
        engine: Arc<dyn StreamEngine>,
        role: Role,
    ) -> std::result::Result<ExpertDaemon, String> {
        let name = pushes::expert_of(role).expect("it has experts");
        config.paths.state.push(name);
        config.paths.experts = config.paths.state.join("experts");
        config.rollout = settings();
        let world = Simulation::current();
        let hides_faults = world.plant == Some(Plant::FaultsUncounted);
        let arms = Arc::new(SimulatedArms {
            seed: world.plan.seed,
            hides_faults,
            loaded: Mutex::default(),
        });
        let told = |error: Error| error.to_string();
        let schema = dataset().schema.clone();
        let acceptor =
            Acceptor::with_loader(config.clone(), schema, wasm().clone(), engine.clone(), load);
        let context = RolloutContext {
            acceptor: Arc::new(acceptor.map_err(told)?),
            serving: arms.clone(),
            replay: |_, _| Ok(ReplayVerdict::Passed("nothing is recorded".into())),
        };
        let service = RolloutService::open(&config, context).map_err(told)?;
        let asked = clock::instant();
        let daemon = ExpertDaemon { role, name, engine, config, service, arms, asked };
        daemon.observe(world.timeline.now.get());
        Ok(daemon)
    }

    /// Follows the registry, answers requests, advances rollouts, and perhaps does what an operator
    /// asks for.
    ///
    /// # Errors
    /// A step of the rollouts has panicked.
    pub fn step(&mut self, versions: &mut RegistryFollower) -> std::result::Result<(), String> {
        let began = Simulation::current().timeline.now.get();
        let schema = Some(&*dataset().schema);
        let desired = DesiredSet::new(&self.config, schema, versions.registry(), &BTreeMap::new());
        let desired = desired.map_err(|error| error.to_string())?;
        self.arms.follow(&desired.experts);
        self.answer(versions.registry());
        self.service.step().map_err(|error| error.to_string())?;
        self.observe(began);
        self.operate(versions);
        self.observe(began);
        Ok(())
    }

    /// Answers the requests that have come since the last step.
    fn answer(&mut self, registry: &Registry) {
        let waited = clock::since(self.asked);
        let due = ((waited.as_secs_f64() * REQUESTS_A_S) as u64).min(MOST_REQUESTS);
        if due == 0 {
            return;
        }
        self.asked = clock::instant();
        for _ in 0..due {
            let bucket = user_bucket(entropy::number() % 100, self.name);
            let shares = registry.expert(self.name).map(|all| &all.shares);
            let version = shares.and_then(|shares| choose_version(shares, bucket));
            self.arms.request(self.name, version);
        }
    }

    /// What an operator does: gives users back by either way, retires versions, and promotes those
    /// that wait for it.
    fn operate(&mut self, versions: &mut RegistryFollower) {
        let (name, rollouts) = (self.name, self.service.of(self.name));
        let waits = rollouts.iter().find(|rollout| rollout.step == RolloutStep::Waiting);
        let choice = entropy::number();
        if let Some(waits) = waits.filter(|_| choice.is_multiple_of(8)) {
            let version = waits.version().to_owned();
            let promotion = Promotion { name: name.into(), version, share: 1.0, replace: false };
            if self.decide(versions, |registry| registry.promote_expert(&promotion)).is_err() {
                drop(self.service.roll_back(name));
            }
        }
        if Simulation::current().healed.get() {
            return;
        }
        match choice % (3 * OPERATOR_ACTS) {
            1 => {
                let is_under_way = |rollout: &Rollout| rollout.is_under_way();
                if self.service.roll_back(name).is_ok()
                    && self.service.of(name).iter().any(is_under_way)
                {
                    let what = format!("one of {name} goes on although it was rolled back");
                    Simulation::current().violate("rollouts", what);
                }
            }
            2 => {
                Simulation::current().ledger.borrow_mut().rollouts.undone_by_hand.insert(name);
                drop(self.decide(versions, |registry| registry.roll_back(name)));
            }
            3 => {
                if let Some(oldest) = rollouts.first() {
                    let version = oldest.version();
                    let key = (name, version.to_owned());
                    Simulation::current().ledger.borrow_mut().rollouts.retired_by_hand.insert(key);
                    drop(
                        self.decide(versions, |registry| {
                            registry.retire_expert(name, version, false)
                        }),
                    );
                }
            }
            _ => {}
        }
    }

    /// Decides something by hand.
    fn decide(
        &self,
        versions: &mut RegistryFollower,
        changes: impl Fn(&Registry) -> hypercast_stream::Result<Vec<Change>>,
    ) -> hypercast_stream::Result<bool> {
        versions.decide(&*self.engine, changes)
    }

    /// Takes a push.
    ///
    /// # Errors
    /// As [`RolloutService::push`]; the registry cannot be reached.
    pub fn push(
        &self,
        call: &PushCall,
        versions: &mut RegistryFollower,
    ) -> Result<(Rollout, bool)> {
        // An operator has seen to it that an FM serves.
        versions.catch_up(&*self.engine)?;
        if versions.registry().newest_fm().is_none() {
            let fm = simulated_fm("1.0.0".into());
            versions.decide::<Error>(&*self.engine, |registry| Ok(registry.register_fm(&fm)?))?;
            versions
                .decide::<Error>(&*self.engine, |registry| Ok(registry.promote_fm("1.0.0")?))?;
        }
        let began = Simulation::current().timeline.now.get();
        let pushed = self.service.push(call.name, &call.version, &call.body);
        self.observe(began);
        pushed
    }

    /// Holds where the rollouts are now against where they were; `began` is when the step began
    /// that has brought them there.
    fn observe(&self, began: Duration) {
        let world = Simulation::current();
        let rollouts = self.service.of(self.name);
        let broken = world.ledger.borrow_mut().rollouts.observe(self.role, &rollouts, began);
        for what in broken {
            world.violate("rollouts", what);
        }
    }
}

/// Loads a push without compiling it.
fn load(_: &Acceptor, of: &PushToLoad<'_>, files: &mut KeptFiles<'_>) -> Result<LoadedPush> {
    let plugin = files.keep(of.push.component, "wasm")?;
    let parameters = files.keep(of.push.parameters.unwrap_or_default(), "safetensors")?;
    let fm: &FmVersion = of.registry.newest_fm().expect("an operator has promoted one");
    let version = ExpertVersion {
        name: of.manifest.name.clone(),
        version: of.manifest.version.clone(),
        state: VersionState::Training,
        parent: None,
        plugin,
        plugin_hash: of.manifest.component.clone(),
        sha256: None,
        plugin_version: of.manifest.version.clone(),
        accepts_fm: "*".into(),
        fm: fm.version.clone(),
        schema: fm.schema.clone(),
        earlier_schemas: Vec::new(),
        columns: None,
        tae_dim: fm.tae_dim,
        flops: None,
        without_tae: false,
        surfaces: of.manifest.surfaces.clone(),
        created_ms: clock::now_ms(),
        trained_ms: 0,
        weights: WeightsLocation::Path(parameters),
    };
    Ok(LoadedPush { version, expert: None })
}

/// The versions that a daemon has loaded, by name and version.
struct SimulatedArms {
    seed: u64,
    /// A planted fault.
    hides_faults: bool,
    loaded: Mutex<BTreeMap<(String, String), SimulatedArm>>,
}

struct SimulatedArm {
    kind: PushedKind,
    share: f64,
    is_shadow: bool,
    stats: Arc<ArmStats>,
    loaded_at: Instant,
    requests: u64,
}

impl SimulatedArms {
    fn with<T>(&self, run: impl FnOnce(&mut BTreeMap<(String, String), SimulatedArm>) -> T) -> T {
        run(&mut self.loaded.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Loads and unloads versions.
    fn follow(&self, desired: &[DesiredExpert]) {
        let key = |of: &DesiredExpert| (of.name.clone(), of.version.clone().unwrap_or_default());
        self.with(|loaded| {
            loaded.retain(|known, _| desired.iter().any(|of| key(of) == *known));
            for of in desired {
                let (name, version) = key(of);
                let kind = pushes::kind_of(self.seed, &name, &version);
                if kind == PushedKind::Unloadable {
                    continue;
                }
                let arm = loaded.entry((name, version)).or_insert_with(|| SimulatedArm {
                    kind,
                    share: 0.0,
                    is_shadow: false,
                    stats: Arc::default(),
                    loaded_at: clock::instant(),
                    requests: 0,
                });
                (arm.share, arm.is_shadow) = (of.share, of.state == VersionState::Shadow);
            }
        });
    }

    /// A request that a version answers, and that the shadows of its expert see.
    fn request(&self, name: &str, version: Option<&str>) {
        self.with(|loaded| {
            for ((_, of), arm) in loaded.iter_mut().filter(|((own, _), _)| own == name) {
                if !arm.is_shadow && version != Some(of) {
                    continue;
                }
                let may_fault = match arm.kind {
                    PushedKind::Faulty => true,
                    PushedKind::FaultyAsCanary => arm.share > 0.0,
                    PushedKind::FaultyForAll => arm.share > 0.999,
                    _ => false,
                };
                arm.requests += 1;
                let faults = may_fault && arm.requests.is_multiple_of(2) && !self.hides_faults;
                arm.stats.add(Duration::from_millis(2), faults);
            }
        });
    }
}

impl VersionLookup for SimulatedArms {
    fn arm(&self, _: &str, _: &str) -> Option<Arc<ExpertArm>> {
        None
    }

    fn measured(&self, name: &str, version: &str) -> Option<MeasuredArm> {
        let key = (name.to_owned(), version.to_owned());
        self.with(|loaded| {
            let arm = loaded.get(&key)?;
            let held = arm.kind == PushedKind::Held && clock::since(arm.loaded_at) < HELD;
            let verdict = match arm.kind {
                PushedKind::Judged => Verdict::RollBack("it predicts worse".into()),
                _ if held => Verdict::Hold("it has not seen enough".into()),
                _ => Verdict::Publish,
            };
            let evaluate = Box::new(move |_: &_| Ok(verdict));
            Some(MeasuredArm { share: arm.share, stats: arm.stats.clone(), evaluate })
        })
    }

    fn problem(&self) -> Option<String> {
        None
    }

    fn slices(&self, _: &str, _: &str, _: Option<&str>) -> Vec<MeasuredSlice> {
        Vec::new()
    }
}

impl Simulation {
    /// A team sends a push, again and again until it is told what becomes of it.
    pub(crate) fn push(&self, number: usize, again: bool) {
        let call = &self.pushes[number];
        if self.healed.get() {
            return;
        }
        let at = self.processes.iter().position(|process| process.role == call.to);
        let at = at.expect("all roles are there");
        let process = &self.processes[at];
        let retry = |ms: u64| {
            self.schedule(Duration::from_millis(ms), Due::Push { number, again });
        };
        let Ok(mut life) = process.life.try_borrow_mut() else { return retry(20) };
        let host = process.host.borrow().clone().filter(|host| !host.is_gone());
        let (Some(host), Some(life_now)) = (host, life.as_mut()) else {
            return retry(1000 + self.draw(at, 3000));
        };
        let mut answer = None;
        let stepped = self.run_on(&host, || {
            answer = Some(life_now.push(call));
            Ok(true)
        });
        drop(life);
        self.count_faults(process.role, &host);
        if let Stepped::Panicked(why) = &stepped {
            self.violate("no surprise", format!("a push panics: {why}"));
        }
        let answer = match (stepped, answer) {
            (Stepped::Went { .. }, Some(Ok((rollout, is_new)))) => {
                PushAnswer::Accepted { created_ms: rollout.created_ms, is_new }
            }
            (Stepped::Went { .. }, Some(Err(error))) => {
                let now = self.timeline.now.get();
                let told = || format!("refuses a push: {error}");
                self.timeline.trace.line(now, &host.name, told);
                let waits = error.to_string().contains("is under way");
                match error.kind() {
                    ErrorKind::Refused if waits => PushAnswer::Busy,
                    ErrorKind::Refused => PushAnswer::Refused(error.to_string()),
                    _ => PushAnswer::Unclear,
                }
            }
            _ => PushAnswer::Unclear,
        };
        let is_told = matches!(answer, PushAnswer::Accepted { .. } | PushAnswer::Refused(_));
        let broken = self.ledger.borrow_mut().rollouts.told(number, call, answer);
        if let Some(what) = broken {
            self.violate("rollouts", what);
        }
        if !is_told {
            retry(1000 + self.draw(at, 8000));
        } else if let Some(after_ms) = call.again_after_ms.filter(|_| !again) {
            let due = Due::Push { number, again: true };
            self.schedule(Duration::from_millis(after_ms), due);
        }
    }
}
