//! What the simulated processes run: the host's own types, put together as the daemon and
//! `hypercast join` do it.

use std::{
    path::Path,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use hypercast_config::{Config, FmGateSettings, JoinSettings, OnGap, PublishSettings};
use hypercast_core::{shutdown::Shutdown, simulated};
use hypercast_data::{
    dataset::{Dataset, Entities, write_dataset},
    schema::Schema,
};
use hypercast_fm::example::{Item, User};
use hypercast_serve::{
    metrics::Metrics, request::feature_state::FeatureFollower, rollout::Rollout,
};
use hypercast_stream::{
    dead_letters::SetAsideRate,
    events::EventWriter,
    join::{JoinMetrics, JoinerProgress, Runner},
    streams::{DirectoryEngine, DirectoryLimits, Record, StreamEngine, Topic},
};
use hypercast_train::follow_expert::ExpertCheckpoint;

use crate::{
    disk::{Disk, DiskCopy},
    expert_trainer::SteppedExpert,
    host::{Machine, ProcessHost},
    logging_tier::SteppedTier,
    model::MARK_WIDTH,
    plan::{Layout, Plan, ROLES, Role, TierSettings},
    plant::Plant,
    publications::{self, ServedWeights},
    pushes::{PushCall, expert_of},
    rollouts::ExpertDaemon,
    server::ServerClient,
    trainer::SteppedTrainer,
    versions::{self, Decider},
    work::CountedEngine,
    world::Simulation,
};

/// The longest time between an example and its correction: longer than any run.
const CORRECTION_S: u64 = 30 * 86_400;

const SCHEMA: &str = r#"
    surfaces = ["feed", "search"]
    actions = ["click", "like"]
    tasks = [
        { name = "click", role = "main", kind = "binary", label = "click" },
        { name = "like", role = "main", kind = "binary", label = "like", surfaces = ["feed"] },
    ]
    item_features = [{ name = "tag", kind = "categorical" }]
    context_features = [{ name = "device", kind = "categorical" }]
    counters = [
        { name = "item", key = ["item_id"], action = "click", half_life_days = 0.0 },
        { name = "user", key = ["user_id"], action = "click", half_life_days = 1.0 },
    ]"#;

/// Where each machine has the data set.
const DATA: &str = "/data";

/// The data set of all simulations, which nothing changes.
struct SharedDataset {
    dataset: &'static Dataset,
    files: DiskCopy,
}

impl SharedDataset {
    /// Writes it as an import does, on a machine of its own.
    fn new() -> SharedDataset {
        let machine = Rc::<Machine>::default();
        let host = ProcessHost::new("import", &machine, &Rc::default(), 0);
        let entered = simulated::enter(Rc::new(host));
        let schema: Schema = toml::from_str(SCHEMA).expect("the schema above");
        let item = |id| Item { id, ids: vec![id % 3], ..Item::default() };
        let items: Vec<Item> = (1..=8).map(item).collect();
        let users: Vec<User> = (1..=5).map(|id| User { id, ..User::default() }).collect();
        let entities = Entities { schema: &schema, items: &items, item_names: &[], users: &users };
        write_dataset(Path::new(DATA), &entities, &mut []).expect("a disk without faults");
        let dataset = Dataset::open(Path::new(DATA)).expect("written above");
        drop(entered);
        let files = machine.disk.borrow().copy(Path::new(DATA)).expect("written above");
        SharedDataset { dataset: Box::leak(Box::new(dataset)), files }
    }
}

thread_local! {
    static DATASET: SharedDataset = SharedDataset::new();
}

/// The data set of all simulations.
pub fn dataset() -> &'static Dataset {
    DATASET.with(|shared| shared.dataset)
}

/// Puts the files of the data set on a disk.
pub fn copy_dataset(disk: &mut Disk) {
    DATASET.with(|shared| disk.put_back(Path::new(DATA), &shared.files));
}

/// The configuration of every process of a plan.
pub fn config(plan: &Plan) -> Config {
    let settings = &plan.settings;
    let mut config = Config::without_folder();
    config.paths.state = "/state".into();
    config.join = JoinSettings {
        in_daemon: settings.join_in_daemon,
        quantile: 0.9,
        min_window_s: settings.min_window_s,
        max_window_s: settings.max_window_s,
        first_window_s: settings.min_window_s.midpoint(settings.max_window_s),
        correction_s: CORRECTION_S,
        tick_ms: settings.tick_ms,
        save_every_events: settings.save_every_events,
        ..JoinSettings::default()
    };
    let TierSettings { batch_requests, save_every_requests, gate_rows, .. } = settings.tiers;
    config.paths.fm_work = "/state/fm".into();
    config.paths.logs = "/state/logs".into();
    config.fm.max_history = 4;
    config.fm.max_targets = 4;
    config.fm.tae_dim = MARK_WIDTH;
    config.fm.batch_requests = batch_requests;
    config.fm.save_every_requests = save_every_requests;
    // Embeddings name the weights, and move however little was learned.
    config.fm_gate =
        FmGateSettings { rows: gate_rows, max_tae_drift: f64::MAX, ..FmGateSettings::default() };
    // A delta has all that moved, so that a follower has the trainer's weights exactly.
    config.publish = PublishSettings {
        share: 1.0,
        starve_after: 1,
        every_s: settings.tiers.publish_every_s,
        snapshot_every: 4,
        zstd_level: 1,
    };
    config.paths.experts = "/state/experts".into();
    config.expert_training.epochs = 1;
    config.expert_training.online_batch_rows = 4 * batch_requests;
    config.logs.rows_per_file = settings.tiers.rows_per_file;
    config.logs.file_seconds = settings.tiers.file_seconds;
    config.fm_logging.batch_candidates = 16;
    config
}

/// The streams as a process sees them. Call it on the process's host.
///
/// # Errors
/// The directory cannot be created.
pub fn engine(
    plan: &Plan,
    process: usize,
    plant: Option<Plant>,
) -> Result<Arc<dyn StreamEngine>, String> {
    match plan.layout {
        Layout::Server => Ok(Arc::new(ServerClient { process })),
        Layout::Directory => {
            let limits = DirectoryLimits {
                fsync: true,
                segment_bytes: plan.settings.segment_bytes,
                retain_bytes: 0,
                remembered_ids: match plant {
                    Some(Plant::HalfOfIds) => plan.settings.remembered_ids / 2,
                    _ => plan.settings.remembered_ids,
                },
            };
            let engine = DirectoryEngine::with(Path::new("/streams"), limits);
            Ok(Arc::new(engine.map_err(|error| error.to_string())?))
        }
    }
}

/// The metrics of a joiner, with a count of the gaps that it told.
struct CountedGaps {
    metrics: Arc<Metrics>,
    gaps: AtomicU64,
}

impl JoinMetrics for CountedGaps {
    fn event_latency(&self, stage: &str, took_ms: i64) {
        self.metrics.event_latency(stage, took_ms);
    }

    fn joiner(&self, progress: JoinerProgress) {
        self.metrics.joiner(progress);
    }

    fn set_aside_rate(&self) -> Arc<SetAsideRate> {
        self.metrics.set_aside_rate()
    }

    fn stream_gap(&self, topic: &Topic) {
        self.gaps.fetch_add(1, Ordering::Relaxed);
        let world = Simulation::current();
        let mut ledger = world.ledger.borrow_mut();
        ledger.gaps_told += 1;
        ledger.event_gaps_told += u64::from(*topic == Topic::events());
        drop(ledger);
        self.metrics.stream_gap(topic);
    }
}

/// What one life of a process holds.
pub struct Life {
    engine: Arc<dyn StreamEngine>,
    /// Every process follows the registry, and some decide.
    pub decider: Decider,
    joiner: Option<Runner>,
    joiner_metrics: Arc<CountedGaps>,
    /// Whether it must stop where events are missing.
    pub stops_at_gaps: bool,
    features: Option<FeatureFollower>,
    trainer: Option<SteppedTrainer>,
    logging: Option<SteppedTier>,
    expert: Option<SteppedExpert>,
    /// The rollouts of a daemon with experts.
    pub rollouts: Option<ExpertDaemon>,
    /// The weights that the daemon follows.
    pub served: Option<ServedWeights>,
    /// Where the daemon's callers send events.
    pub ingest: Option<EventWriter>,
}

impl Life {
    /// Starts a process.
    ///
    /// # Errors
    /// What the process would say before it ends.
    pub fn open(plan: &Plan, plant: Option<Plant>, process: usize) -> Result<Life, String> {
        let (mut config, role) = (config(plan), ROLES[process]);
        match plant {
            Some(Plant::TimesBelieved) => config.join.max_future_s = 0,
            Some(Plant::NoTicks) => config.join.tick_ms = u64::MAX,
            Some(Plant::SavedAtEvents) => config.join.save_every_events = 1,
            _ => {}
        }
        let stops_at_gaps = !Simulation::current().gaps_accepted.get();
        config.engine.on_gap = if stops_at_gaps { OnGap::Stop } else { OnGap::Continue };
        let engine = engine(plan, process, plant)?;
        let engine: Arc<dyn StreamEngine> = Arc::new(CountedEngine { engine, process });
        let metrics = Arc::new(Metrics::default());
        let joiner_metrics =
            Arc::new(CountedGaps { metrics: metrics.clone(), gaps: AtomicU64::new(0) });
        let stop = Shutdown::default();
        let told = |error: &dyn std::fmt::Display| error.to_string();
        let is_daemon = role == Role::Daemon;
        let ingest = is_daemon.then(|| EventWriter::new(engine.clone(), &config.join));
        let mut joiner = None;
        let is_joiner = matches!(role, Role::Joiner | Role::SecondJoiner);
        if is_joiner || is_daemon && config.join.in_daemon {
            if let Some(ingest) = &ingest {
                ingest.open().map_err(|error| told(&error))?;
            }
            let settings = config.joiner().map_err(|error| told(&error))?;
            let (data, metrics) = (dataset(), joiner_metrics.clone());
            let runner = Runner::open(engine.clone(), &settings, data, metrics, stop.clone());
            joiner = Some(runner.map_err(|error| told(&error))?);
        }
        let open = || SteppedTrainer::open(engine.clone(), &config, plant);
        let trainer = (role == Role::Trainer).then(open).transpose()?;
        let open = || SteppedTier::open(engine.clone(), &config, plant);
        let logging = (role == Role::LoggingTier).then(open).transpose()?;
        let open = || SteppedExpert::open(engine.clone(), &config, plant);
        let expert = (role == Role::ExpertTrainer).then(open).transpose()?;
        let open = || ServedWeights::open(engine.clone(), publications::topic());
        let served = is_daemon.then(open).transpose()?;
        let rollouts = expert_of(role)
            .map(|_| ExpertDaemon::open(config.clone(), engine.clone(), role))
            .transpose()?;
        let decider = Decider::open(process, engine.clone())?;
        let mut features = None;
        if is_daemon {
            let follower = FeatureFollower::open(engine.clone(), &config, dataset(), metrics, stop);
            features = Some(follower.map_err(|error| told(&error))?);
        }
        Ok(Life {
            engine,
            decider,
            joiner,
            joiner_metrics,
            stops_at_gaps,
            features,
            trainer,
            logging,
            expert,
            rollouts,
            served,
            ingest,
        })
    }

    /// Does what is to be done now, and says whether that was something.
    ///
    /// # Errors
    /// What the process says before it ends.
    pub fn step(&mut self) -> Result<bool, String> {
        let mut is_busy = false;
        if let Some(joiner) = &mut self.joiner {
            is_busy = joiner.step(Duration::ZERO).map_err(|error| error.to_string())? > 0;
        }
        if let Some(features) = &mut self.features {
            features.step(Duration::ZERO).map_err(|error| error.to_string())?;
        }
        if let Some(ingest) = &self.ingest {
            ingest.tick_if_quiet();
        }
        if let Some(trainer) = &mut self.trainer {
            is_busy |= trainer.step()?;
        }
        if let Some(logging) = &mut self.logging {
            is_busy |= logging.step()?;
        }
        if let Some(expert) = &mut self.expert {
            is_busy |= expert.step()?;
        }
        if let Some(served) = &mut self.served {
            served.step();
        }
        self.decider.step();
        if let Some(rollouts) = &mut self.rollouts {
            rollouts.step(&mut self.decider.versions)?;
        }
        Ok(is_busy)
    }

    /// Takes a push, which is sent to daemons with experts alone.
    ///
    /// # Errors
    /// What the daemon answers.
    pub fn push(&mut self, call: &PushCall) -> hypercast_serve::Result<(Rollout, bool)> {
        let rollouts = self.rollouts.as_ref().expect("pushes are sent to daemons with experts");
        rollouts.push(call, &mut self.decider.versions)
    }

    /// Ends it in order.
    ///
    /// # Errors
    /// A state cannot be saved.
    pub fn stop(mut self) -> Result<(), String> {
        if let Some(features) = &mut self.features {
            features.save();
        }
        self.trainer.take().map_or(Ok(()), SteppedTrainer::stop)?;
        self.logging.take().map_or(Ok(()), SteppedTier::stop)?;
        self.expert.take().map_or(Ok(()), SteppedExpert::stop)?;
        self.joiner.as_mut().map_or(Ok(()), |joiner| joiner.save().map_err(|e| e.to_string()))
    }

    /// Appends an event that only a later version of the host knows.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn append_later_event(&self) -> Result<(), String> {
        let record = Record { id: 0, payload: vec![2, 0] };
        let appender = self.engine.appender(&Topic::events());
        let appended = appender.and_then(|appender| appender.append(&[record]));
        appended.map(drop).map_err(|error| error.to_string())
    }

    /// Appends a decision that only a later version of the host knows.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn append_later_decision(&self) -> Result<(), String> {
        versions::decide_as_later_version(&*self.engine)
    }

    /// How many events were joined, if this process joins.
    pub fn joined(&self) -> Option<u64> {
        self.joiner.as_ref().map(|joiner| joiner.passed().events)
    }

    /// How many gaps were counted, if this process joins.
    pub fn gaps_told(&self) -> Option<u64> {
        self.joiner.as_ref().map(|_| self.joiner_metrics.gaps.load(Ordering::Relaxed))
    }

    /// Where the trainer of an expert stands, if this process is one.
    pub fn expert_place(&self) -> Option<ExpertCheckpoint> {
        self.expert.as_ref()?.place()
    }

    /// The features that requests would read, if this process has any.
    pub fn features(&self) -> Option<&FeatureFollower> {
        self.features.as_ref()
    }
}
