//! A deployment whose daemon has the arms: versions of one expert that share its users.
//!
//! - `FM alone` ranks by the FM's own heads: an expert starts at these, and this one never learns.
//! - `one-stage` does so with another FM, which learns from the tested surface alone. It is as wide
//!   as its cost must be to be no less than that of FM and expert together.
//! - `FM and expert` is the expert as its trainer publishes it.
//! - Further components are compared as that expert is, each by its own name and trainer.
//!
//! All learn from the past, and go on with what any arm shows.

use std::path::{Path, PathBuf};

use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::{Dataset, Entities, Impression, write_dataset};
use hypercast_expert::normalise::Normaliser;
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

/// The plugin: it has a short history of its own, and orders by the value of all actions.
pub const PLUGIN: &str = "short-term";

/// The name that the arms share.
const EXPERT: &str = "feed";

/// The FM that most arms are beside, and that of the one-stage model.
const FM_VERSIONS: [&str; 2] = ["1.0.0", "2.0.0"];

/// An arm: a version of the expert.
#[derive(Debug, Clone)]
pub struct AbArm {
    /// As reports name it.
    pub name: String,
    version: String,
    /// Index of the FM that it is beside, in [`FM_VERSIONS`].
    fm: usize,
    /// The component that a trainer publishes parameters for; none for the FM's own heads.
    learner: Option<String>,
}

/// The arms, each compared with those before it; `variants` are components in the plugins' folder.
///
/// # Errors
/// Two arms of one name.
pub fn arms(variants: &[String]) -> Result<Vec<AbArm>> {
    let own = [("FM alone", 0, None), ("one-stage", 1, None), ("FM and expert", 0, Some(PLUGIN))];
    let variants = variants.iter().map(|name| (name.as_str(), 0, Some(name.as_str())));
    let arm = |(at, (name, fm, learner)): (usize, (&str, usize, Option<&str>))| AbArm {
        name: name.to_owned(),
        version: format!("{}.0.0", at + 1),
        fm,
        learner: learner.map(str::to_owned),
    };
    let arms: Vec<AbArm> = own.into_iter().chain(variants).enumerate().map(arm).collect();
    for (at, AbArm { name, .. }) in arms.iter().enumerate() {
        if arms[..at].iter().any(|other| other.name == *name) {
            return Err(Error::invalid(format!(
                "--variant {name}: there is an arm of this name already"
            )));
        }
    }
    Ok(arms)
}

/// Seconds between publications, and between two files of the logs: minutes of the world's time.
const PUBLISH_EVERY_S: u64 = 2;

/// What happened before the test.
pub struct AbPast<'a> {
    /// The world after it.
    pub world: &'a ClosedLoopWorld,
    /// Its impressions, in their order.
    pub rows: Vec<Impression>,
    /// When it ends and the test begins.
    pub until_ms: i64,
}

/// The daemon and all that learns beside it.
pub struct Deployment {
    processes: ProcessGroup,
    /// Asks the daemon.
    pub client: DemoClient,
    /// The arm of each user, as the daemon chooses it.
    pub arm_of_user: Vec<usize>,
    /// In the order of `arm_of_user` and `flops`.
    pub arms: Vec<AbArm>,
    /// Floating-point operations a candidate, by arm.
    pub flops: Vec<u64>,
    /// What the FM and the expert are configured as.
    pub config: Config,
}

/// The configurations, and what the arms cost.
struct AbConfigs {
    config: Config,
    /// The files of the FMs, in the order of [`FM_VERSIONS`].
    fms: [PathBuf; 2],
    /// The file of each arm: that of its FM, or one with its component.
    arms: Vec<PathBuf>,
    dataset: Dataset,
    flops: Vec<u64>,
}

impl Deployment {
    /// Trains on the past, and starts every process with an equal share of the users for each arm.
    ///
    /// # Errors
    /// The failure of a step.
    pub fn start(
        setup: &EvaluationSetup,
        arms: Vec<AbArm>,
        seed: u64,
        past: AbPast<'_>,
        times: &StepTimes,
        stop: &Shutdown,
    ) -> Result<Self> {
        let (work, users, until_ms) = (setup.work(), past.world.users().len(), past.until_ms);
        write_past(past, &work.join("data"), &work.join("data-one-stage"))?;
        let configs = configure(setup, &arms, seed, until_ms)?;
        let mut processes = ProcessGroup::new(work.join("process-logs"), stop.clone())?;
        for path in &configs.fms {
            times.time("train on the past", || processes.complete(&["train", "fm"], path))?;
        }
        let url = times.time("start", || start(&configs, &arms, &mut processes))?;
        let AbConfigs { config, dataset, flops, .. } = configs;
        let arm_of_user = arms_of_users(&config, &arms, users)?;
        let client = DemoClient::new(url, &dataset)?;
        Ok(Self { processes, client, arm_of_user, arms, flops, config })
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
        let wanted = &*self.arms[self.arm_of_user[user as usize - 1]].version;
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

/// Writes the configurations into the work folder, with paths relative to it.
fn configure(
    setup: &EvaluationSetup,
    arms: &[AbArm],
    seed: u64,
    until_ms: i64,
) -> Result<AbConfigs> {
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
    let of_component = |name: &str| {
        let own = preset::expert(EXPERT, setup.plugins.join(format!("{name}.wasm")));
        let surfaces = vec![FIRST_SURFACE.to_owned()];
        let experts = vec![ExpertEntry { surfaces, train_on: TrainOn::Own, ..own }];
        Config { experts, ..config.clone() }
    };
    let write = |config: &Config, name: &str| -> Result<PathBuf> {
        let path = work.join(format!("{name}.toml"));
        config.write(&path)?;
        Ok(path)
    };
    let spec = dataset_spec(&dataset)?;
    let fm = one_stage_flops(&config.fm, &spec);
    let with_expert = |config: &Config| -> Result<u64> {
        Ok(fm + preset::blueprint(config, &dataset, FM_VERSIONS[0])?.flops())
    };
    let first = of_component(PLUGIN);
    let mut one_stage = first.clone();
    one_stage.fm = widened(&first.fm, &spec, with_expert(&first)?);
    one_stage.paths.dataset = work.join("data-one-stage");
    one_stage.paths.fm = work.join("fm-one-stage");
    one_stage.paths.fm_work = work.join("fm-work-one-stage");
    one_stage.paths.logs = work.join("logs-one-stage");
    let fms = [write(&first, "hypercast")?, write(&one_stage, "one-stage")?];
    let (mut files, mut flops) = (Vec::new(), Vec::new());
    for arm in arms {
        let (file, cost) = match arm.learner.as_deref() {
            None => (fms[arm.fm].clone(), one_stage_flops(&[&first, &one_stage][arm.fm].fm, &spec)),
            Some(component) => {
                let own = of_component(component);
                (write(&own, &format!("expert-{component}"))?, with_expert(&own)?)
            }
        };
        files.push(file);
        flops.push(cost);
    }
    let config = Config::read(&fms[0])?;
    Ok(AbConfigs { config, fms, arms: files, dataset, flops })
}

/// An FM like another one, as much wider as it takes to cost that much.
fn widened(fm: &FmConfig, spec: &FmSpec, least_flops: u64) -> FmConfig {
    let mut wider = fm.clone();
    while one_stage_flops(&wider, spec) < least_flops {
        wider.dim += 8;
    }
    wider
}

/// Starts the trainers, registers the arms and gives each its users; then the logging tier and the
/// daemon, whose address it returns.
fn start(configs: &AbConfigs, arms: &[AbArm], processes: &mut ProcessGroup) -> Result<String> {
    let AbConfigs { fms, arms: files, .. } = configs;
    let [first, _] = fms;
    for (version, path) in FM_VERSIONS.into_iter().zip(fms) {
        let words = ["train", "fm", "--follow", "--version", version];
        processes.start(&format!("train-fm-{version}"), &words, path)?;
    }
    let trainer = |arm: &AbArm| format!("train-expert-{}", arm.version);
    for (arm, path) in arms.iter().zip(files).filter(|(arm, _)| arm.learner.is_some()) {
        let (version, fm) = (arm.version.as_str(), FM_VERSIONS[arm.fm]);
        let words = ["train", "expert", EXPERT, "--follow", "--version", version, "--fm", fm];
        processes.start(&trainer(arm), &words, path)?;
    }
    for (version, path) in FM_VERSIONS.into_iter().zip(fms) {
        processes.await_output(&format!("train-fm-{version}"), PUBLISHED, VERSION_WITHIN)?;
        processes.accepted(&["register", "fm", "--published", version], path)?;
        processes.accepted(&["promote", "fm", version], first)?;
    }
    for (arm, path) in arms.iter().zip(files) {
        let register = ["register", "expert", EXPERT, &arm.version];
        if arm.learner.is_some() {
            processes.await_output(&trainer(arm), PUBLISHED, VERSION_WITHIN)?;
            processes.accepted(&[&register[..], &["--published"]].concat(), path)?;
        } else {
            let parameters = untrained(path, FM_VERSIONS[arm.fm])?.display().to_string();
            let own = ["--parameters", &parameters];
            processes.accepted(&[&register[..], &own].concat(), first)?;
        }
    }
    for (at, arm) in arms.iter().enumerate() {
        let share = (1.0 / (at + 1) as f64).to_string();
        let words = ["promote", "expert", EXPERT, &arm.version, "--share", &share];
        processes.accepted(&words, first)?;
    }
    processes.start("log", &["materialise", "--follow"], first)?;
    processes.start("serve", &["serve", "--listen", "127.0.0.1:0"], first)?;
    processes.await_output("serve", "listening on ", VERSION_WITHIN)
}

/// The file of an expert's parameters before it has learned, beside the FM of a configuration: it
/// predicts what that FM does.
fn untrained(path: &Path, version: &str) -> Result<PathBuf> {
    let config = Config::read(path)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let blueprint = preset::blueprint(&config, &dataset, version)?;
    let file = path.with_file_name(format!("own-heads-{version}.safetensors"));
    let names = blueprint.columns.feature_names();
    blueprint.init_parameters(Normaliser::identity(names), config.fm.seed).save(&file)?;
    Ok(file)
}

fn arms_of_users(config: &Config, arms: &[AbArm], users: usize) -> Result<Vec<usize>> {
    let engine = streams::open(&config.engine)?;
    let mut registry = RegistryFollower::new(&*engine)?;
    registry.catch_up(&*engine)?;
    let shares = registry.registry().expert(EXPERT).map(|expert| expert.shares.clone());
    let shares = shares.unwrap_or_default();
    let arm = |user: u64| {
        let version = choose_version(&shares, user_bucket(user, EXPERT));
        let arm = arms.iter().position(|own| version == Some(&*own.version));
        arm.ok_or_else(|| Error::internal(format!("no arm answers user {user}: {shares:?}")))
    };
    (1..=users as u64).map(arm).collect()
}
