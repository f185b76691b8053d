//! A deployment whose daemon has the arms: versions of one expert that share its users.
//!
//! - `FM alone` ranks by the FM's own heads: an expert starts at these, and this one never learns.
//! - `one-stage` does so with another FM, which learns from the tested surface alone. It is as wide
//!   as its cost must be to be no less than that of FM and expert together.
//! - `FM and expert` is the expert as its trainer publishes it.
//!
//! All learn from the past, and go on with what any arm shows.

use std::path::{Path, PathBuf};

use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::{
    dataset::{Dataset, Entities, Impression, write_dataset},
    schema::Schema,
};
use hypercast_expert::{Blueprint, Engine, LoadOptions, normalise::Normaliser};
use hypercast_fm::{
    cost::one_stage_flops,
    spec::{FmConfig, FmSpec},
};
use hypercast_stream::{
    registry::{RegistryFollower, choose_version, user_bucket},
    streams,
};
use hypercast_train::fm::dataset_spec;

use super::world::{ClosedLoopWorld, FIRST_SURFACE, schema};
use crate::{
    demo::{
        StepTimes,
        client::DemoClient,
        preset,
        streaming::{PUBLISHED, VERSION_WITHIN},
    },
    error::{CommonErrors as _, Error, Result},
    evaluate::setup::EvaluationSetup,
    processes::ProcessGroup,
};

/// The arms, each compared with those before it.
pub const ARMS: [&str; 3] = ["FM alone", "one-stage", "FM and expert"];

/// The plugin: it has a short history of its own, and orders by the value of all actions.
pub const PLUGIN: &str = "short-term";

/// The name that the arms share.
const EXPERT: &str = "feed";

/// The arms' versions, and the versions of the FM that they pin.
const VERSIONS: [&str; ARMS.len()] = ["1.0.0", "2.0.0", "3.0.0"];
const PINNED: [&str; ARMS.len()] = ["1.0.0", "2.0.0", "1.0.0"];
const FM_VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

/// Seconds between publications, and between two files of the logs: minutes of the world's time.
const PUBLISH_EVERY_S: u64 = 2;

/// What happened before the test.
pub struct AbPast<'a> {
    /// The world after it.
    pub world: &'a ClosedLoopWorld,
    /// Its impressions, in their order.
    pub rows: Vec<Impression>,
    /// Its end.
    pub until_ms: i64,
}

/// The daemon and all that learns beside it.
pub struct Deployment {
    processes: ProcessGroup,
    /// Asks the daemon.
    pub client: DemoClient,
    /// The arm of each user, as the daemon chooses it.
    pub arms: Vec<usize>,
    /// Floating-point operations a candidate, by arm.
    pub flops: [u64; ARMS.len()],
    /// What the FM and the expert are configured as.
    pub config: Config,
}

/// The configurations, and what the arms cost.
struct AbConfigs {
    config: Config,
    first: PathBuf,
    one_stage: PathBuf,
    dataset: Dataset,
    flops: [u64; ARMS.len()],
}

impl Deployment {
    /// Trains on the past, and starts every process with a third of the users for each arm.
    ///
    /// # Errors
    /// The failure of a step.
    pub fn start(
        setup: &EvaluationSetup,
        seed: u64,
        past: AbPast<'_>,
        times: &StepTimes,
        stop: &Shutdown,
    ) -> Result<Self> {
        let (work, users, until_ms) = (setup.work(), past.world.users().len(), past.until_ms);
        write_past(past, &work.join("data"), &work.join("data-one-stage"))?;
        let configs = configure(setup, seed, until_ms)?;
        let mut processes = ProcessGroup::new(work.join("process-logs"), stop.clone())?;
        for path in [&configs.first, &configs.one_stage] {
            times.time("train on the past", || processes.complete(&["train", "fm"], path))?;
        }
        let url = times.time("start", || start(&configs, &mut processes))?;
        let AbConfigs { config, dataset, flops, .. } = configs;
        let arms = arms_of_users(&config, users)?;
        Ok(Self { processes, client: DemoClient::new(url, &dataset)?, arms, flops, config })
    }

    /// Checks that every process runs.
    ///
    /// # Errors
    /// One that has ended.
    pub fn check(&mut self) -> Result<()> {
        self.processes.check()
    }

    /// Checks that an answer came from a user's arm.
    ///
    /// # Errors
    /// It came from another version.
    pub fn check_arm(&self, user: u64, version: Option<&str>) -> Result<()> {
        let wanted = VERSIONS[self.arms[user as usize - 1]];
        if version == Some(wanted) {
            return Ok(());
        }
        Err(Error::internal(format!(
            "user {user} is of version {wanted} of expert {EXPERT}, and {version:?} answered"
        )))
    }

    /// Stops every process.
    ///
    /// # Errors
    /// One that did not end well.
    pub fn stop(&mut self) -> Result<()> {
        self.processes.stop()
    }
}

/// The past as two data sets, of which the second has labels of the tested surface alone: a model
/// of one surface reads what users did elsewhere, and learns from its own.
fn write_past(past: AbPast<'_>, data: &Path, own: &Path) -> Result<()> {
    let AbPast { world, mut rows, .. } = past;
    let mut own_schema = schema();
    own_schema.tasks.iter_mut().for_each(|task| task.surfaces = vec![FIRST_SURFACE.into()]);
    let (items, users) = (world.items(0), world.users());
    for (schema, dir) in [(&schema(), data), (&own_schema, own)] {
        let entities = Entities { schema, items: &items, item_names: &[], users: &users };
        write_dataset(dir, &entities, &mut rows)?;
    }
    Ok(())
}

/// Writes both configurations into the work folder, with paths relative to it.
fn configure(setup: &EvaluationSetup, seed: u64, until_ms: i64) -> Result<AbConfigs> {
    let work = setup.work();
    let dataset = Dataset::open(&work.join("data"))?;
    let mut config = setup.config(&dataset)?;
    config.fm.seed = seed;
    config.expert_training.seed = seed;
    config.timeline.until = until_ms.to_string();
    config.publish.every_s = PUBLISH_EVERY_S;
    config.publish.snapshot_every = 20;
    config.logs.file_seconds = PUBLISH_EVERY_S;
    // Nothing of a test has to outlive the machine.
    config.engine.fsync = false;
    // What an arm costs is reported, and limits nothing.
    config.plugin_limits.max_flops_share = 10.0;
    let plugin = setup.plugins.join(format!("{PLUGIN}.wasm"));
    let own = preset::expert(EXPERT, plugin);
    let surfaces = vec![FIRST_SURFACE.to_owned()];
    config.experts = vec![ExpertEntry { surfaces, train_on: TrainOn::Own, ..own }];
    let spec = dataset_spec(&dataset)?;
    let fm = one_stage_flops(&config.fm, &spec);
    let expert = own_heads(&config, &dataset.schema, &config.fm, FM_VERSIONS[0])?.flops();
    let mut one_stage = config.clone();
    one_stage.fm = widened(&config.fm, &spec, fm + expert);
    one_stage.paths.dataset = work.join("data-one-stage");
    one_stage.paths.fm = work.join("fm-one-stage");
    one_stage.paths.fm_work = work.join("fm-work-one-stage");
    one_stage.paths.logs = work.join("logs-one-stage");
    let write = |config: &Config, name: &str| -> Result<PathBuf> {
        let path = work.join(name);
        config.write(&path)?;
        Ok(path)
    };
    let first = write(&config, "hypercast.toml")?;
    Ok(AbConfigs {
        flops: [fm, one_stage_flops(&one_stage.fm, &spec), fm + expert],
        one_stage: write(&one_stage, "one-stage.toml")?,
        config: Config::read(&first)?,
        first,
        dataset,
    })
}

/// An FM like another one, as much wider as it takes to cost that much.
fn widened(fm: &FmConfig, spec: &FmSpec, least_flops: u64) -> FmConfig {
    let mut wider = fm.clone();
    while one_stage_flops(&wider, spec) < least_flops {
        wider.dim += 8;
    }
    wider
}

/// The expert beside an FM.
fn own_heads(config: &Config, schema: &Schema, fm: &FmConfig, version: &str) -> Result<Blueprint> {
    let options = LoadOptions {
        tae_dim: fm.tae_width(),
        fm_version: Some(version.to_owned()),
        ..config.load_options(EXPERT, 0)
    };
    let engine = Engine::new(config.guests())?;
    Ok(Blueprint::load(&engine, &config.experts[0].plugin, schema, &options)?)
}

/// Starts the trainers, registers the arms and gives each its users; then the logging tier and the
/// daemon, whose address it returns.
fn start(configs: &AbConfigs, processes: &mut ProcessGroup) -> Result<String> {
    let AbConfigs { first, one_stage, .. } = configs;
    let trained = [(FM_VERSIONS[0], first), (FM_VERSIONS[1], one_stage)];
    for (version, path) in trained {
        let words = ["train", "fm", "--follow", "--version", version];
        processes.start(&format!("train-fm-{version}"), &words, path)?;
    }
    let [.., learns] = VERSIONS;
    let words = ["train", "expert", EXPERT, "--follow", "--version", learns, "--fm", PINNED[2]];
    processes.start("train-expert", &words, first)?;
    for (version, path) in trained {
        processes.await_output(&format!("train-fm-{version}"), PUBLISHED, VERSION_WITHIN)?;
        processes.accepted(&["register", "fm", "--published", version], path)?;
        processes.accepted(&["promote", "fm", version], first)?;
    }
    for (arm, path) in [(0, first), (1, one_stage)] {
        let parameters = untrained(path, PINNED[arm])?;
        let parameters = parameters.display().to_string();
        let words = ["register", "expert", EXPERT, VERSIONS[arm], "--parameters", &parameters];
        processes.accepted(&words, first)?;
    }
    processes.await_output("train-expert", PUBLISHED, VERSION_WITHIN)?;
    processes.accepted(&["register", "expert", EXPERT, learns, "--published"], first)?;
    for (arm, version) in VERSIONS.into_iter().enumerate() {
        let share = (1.0 / (arm + 1) as f64).to_string();
        processes.accepted(&["promote", "expert", EXPERT, version, "--share", &share], first)?;
    }
    processes.start("log", &["materialise", "--follow"], first)?;
    processes.start("serve", &["serve", "--listen", "127.0.0.1:0"], first)?;
    processes.await_output("serve", "listening on ", VERSION_WITHIN)
}

/// The file of an expert's parameters before it has learned, beside the FM of a configuration: it
/// predicts what that FM does.
fn untrained(path: &Path, version: &str) -> Result<PathBuf> {
    let config = Config::read(path)?;
    let schema = Dataset::open(&config.paths.dataset)?.schema;
    let blueprint = own_heads(&config, &schema, &config.fm, version)?;
    let file = path.with_file_name(format!("own-heads-{version}.safetensors"));
    let names = blueprint.columns.feature_names();
    blueprint.init_parameters(Normaliser::identity(names), config.fm.seed).save(&file)?;
    Ok(file)
}

fn arms_of_users(config: &Config, users: usize) -> Result<Vec<usize>> {
    let engine = streams::open(&config.engine)?;
    let mut registry = RegistryFollower::new(&*engine)?;
    registry.catch_up(&*engine)?;
    let shares = registry.registry().expert(EXPERT).map(|expert| expert.shares.clone());
    let shares = shares.unwrap_or_default();
    let arm = |user: u64| {
        let version = choose_version(&shares, user_bucket(user, EXPERT));
        let arm = VERSIONS.into_iter().position(|own| version == Some(own));
        arm.ok_or_else(|| Error::internal(format!("no arm answers user {user}: {shares:?}")))
    };
    (1..=users as u64).map(arm).collect()
}
