//! The paper's experiments (section 4) on any data set: what a TAE is worth, what
//! of a bigger FM's gain reaches experts, what unseen tasks gain, what it costs, what publishing a part costs.
//!
//! Every arm of a seed shares one FM pass and one log; arms are compared on the
//! same rows, with intervals from a bootstrap over users. Nothing is selected:
//! every seed is in the report.

mod bootstrap;
mod compute;
mod field;
mod latency;
mod publish;
mod report;
mod tae;
mod tally;
#[cfg(test)]
mod tests;
mod transfer;
mod unseen;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use hypercast_data::labels::Labels;
use hypercast_fm::example::Example;
use serde_json::{Value, json};

pub use self::report::{Report, Row, Seed};
use self::{field::Field, report::Found, tally::Tally};
use crate::demo::{Data, Seconds};
use crate::error::{CommonErrors as _, Error, Result};
use crate::evaluate::{
    setup::Setup,
    stream::{Mode, Part, Stream, Users},
    window::{Asked, Window},
};
use hypercast_config::Config;
use hypercast_data::dataset::Dataset;
use hypercast_data::logs::{LogReader, LogVersion, LogWriter};
use hypercast_expert::Engine;
use hypercast_train::fm::{FIRST_VERSION, remove_dir};

/// The experiments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Experiment {
    /// Table 1: no embedding, user embedding, TAE, both
    Tae,
    /// Table 2: how much of a larger FM's gain reaches experts
    Transfer,
    /// Table 3: tasks of a surface that the FM was never trained on
    Unseen,
    /// FM and expert against a one-stage model: parameters, FLOPs, samples/s, latency
    Compute,
    /// Component-wise publishing: all that moved, a share of it, or nothing, to copies that serve
    Publish,
}

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which experiment.
    pub experiment: Experiment,
    /// The data set, the work folder, the plugins.
    pub setup: Setup,
    /// Whether the test teaches.
    pub mode: Mode,
    /// Where the test and the report begin.
    pub asked: Asked,
    /// Seeds of FM and experts.
    pub seeds: Vec<u64>,
    /// The share of users that take part; the data set's default if missing.
    pub users: Option<f64>,
    /// Draws of the bootstrap.
    pub replicates: usize,
    /// The expert: a file in the plugins' folder, without `.wasm`.
    pub expert: String,
    /// How old a user embedding is at least, in hours (`tae`).
    pub stale_hours: f64,
    /// Minutes of the data set's clock between publications (`publish`).
    pub publish_minutes: f64,
    /// The surface of `unseen` and `compute`; the one with the most requests if missing.
    pub surface: Option<String>,
    /// The one task of that surface which the FM sees (`unseen`); the first if missing.
    pub task: Option<String>,
}

/// The share of users that lets an experiment with three seeds end within a quarter of an hour on two cores.
pub fn default_users(data: Data) -> f64 {
    match data {
        Data::Movielens => 0.3,
        Data::Kuairand => 0.25,
        Data::Simulated => 1.0,
    }
}

/// Runs an experiment.
///
/// # Errors
/// Options that do not fit the data, and whatever its steps say.
pub fn run(options: &Options) -> Result<Report> {
    let share = options.users.unwrap_or_else(|| default_users(options.setup.data));
    if !(share > 0.0 && share <= 1.0) {
        return Err(Error::invalid(format!("--users {share}: it must be above 0 and at most 1")));
    }
    if options.seeds.is_empty() || options.replicates == 0 {
        return Err(Error::invalid("at least one seed and one replicate are needed"));
    }
    let mut seconds = Seconds::default();
    let dataset = seconds.time("import", || options.setup.dataset())?;
    let config = options.setup.config(&dataset)?;
    std::fs::create_dir_all(&options.setup.work).map_err(Error::io(&options.setup.work))?;
    let ground = Ground {
        window: Window::new(options.setup.data, &options.asked, &config, &dataset)?,
        users: Users { share, salt: 0 },
        engine: Engine::new(config.guests())?,
        plugin: options.setup.plugins.join(format!("{}.wasm", options.expert)),
        labels: Labels::new(&dataset.schema),
        options,
        dataset: &dataset,
        config: &config,
    };
    let outcome = match options.experiment {
        Experiment::Tae => tae::run(&ground, &mut seconds),
        Experiment::Transfer => transfer::run(&ground, &mut seconds),
        Experiment::Unseen => unseen::run(&ground, &mut seconds),
        Experiment::Compute => compute::run(&ground, &mut seconds),
        Experiment::Publish => publish::run(&ground, &mut seconds),
    }?;
    Ok(ground.report(outcome, seconds.0))
}

/// What an experiment found.
struct Outcome {
    name: &'static str,
    rows: Vec<Row>,
    models: Vec<Value>,
    table: String,
    /// What it chose besides the common settings.
    chosen: Value,
}

/// What all experiments stand on.
struct Ground<'a> {
    options: &'a Options,
    dataset: &'a Dataset,
    config: &'a Config,
    window: Window,
    users: Users,
    engine: Engine,
    plugin: PathBuf,
    labels: Labels,
}

impl Ground<'_> {
    /// The configuration of a seed.
    fn seeded(&self, seed: u64) -> Config {
        let mut config = self.config.clone();
        config.fm.seed = seed;
        config.expert_training.seed = seed;
        config
    }

    /// The stream of a seed's configuration, with histories of so many events.
    fn stream<'b>(&'b self, config: &'b Config, history_len: usize) -> Stream<'b> {
        Stream {
            dataset: self.dataset,
            config,
            window: self.window,
            mode: self.options.mode,
            history_len,
            users: self.users,
        }
    }

    /// A fresh log for embeddings of a width.
    fn log(&self, config: &Config, width: usize) -> Result<LogWriter> {
        remove_dir(&config.paths.logs)?;
        let versions = vec![LogVersion::new(FIRST_VERSION, width)];
        Ok(LogWriter::create(
            &config.paths.logs,
            &self.dataset.schema,
            config.logs.options(),
            versions,
        )?)
    }

    /// Where the arms of a seed are trained and measured.
    fn field<'b>(&'b self, config: &'b Config, log: &'b LogReader) -> Field<'b> {
        Field {
            config,
            log,
            engine: &self.engine,
            plugin: &self.plugin,
            window: self.window,
            mode: self.options.mode,
        }
    }

    /// Sums for some arms over the reported stretch.
    fn tally(&self, arms: &[&str]) -> Tally {
        Tally::new(&self.labels, self.window.report_from_ms, arms)
    }

    /// The sums of all seeds.
    fn found<'b>(&'b self, tallies: &'b [Tally]) -> Found<'b> {
        Found {
            schema: &self.dataset.schema,
            tallies,
            seeds: &self.options.seeds,
            replicates: self.options.replicates,
        }
    }

    /// The surface that was asked for, or the one with the most impressions before the test.
    fn surface(&self) -> Result<u16> {
        let schema = &self.dataset.schema;
        if let Some(name) = &self.options.surface {
            return schema.surface(name).ok_or_else(|| {
                Error::invalid(format!(
                    "--surface {name}: no such surface; there are {:?}",
                    schema.surfaces
                ))
            });
        }
        let mut counts = BTreeMap::<u16, u64>::new();
        for impression in self.dataset.impressions()? {
            let impression = impression?;
            if !impression.history_only && impression.time_ms < self.window.test_from_ms {
                *counts.entry(impression.surface).or_default() += 1;
            }
        }
        let most =
            counts.into_iter().max_by_key(|&(surface, count)| (count, std::cmp::Reverse(surface)));
        Ok(most.map_or(0, |(surface, _)| surface))
    }

    fn report(&self, outcome: Outcome, seconds: BTreeMap<String, f64>) -> Report {
        let config = json!({
            "data": format!("{:?}", self.options.setup.data).to_lowercase(),
            "mode": self.options.mode,
            "test_from": self.window.say(self.window.test_from_ms),
            "report_from": self.window.say(self.window.report_from_ms),
            "users_share": self.users.share,
            "replicates": self.options.replicates,
            "expert": self.options.expert,
            "fm": self.config.fm,
            "expert_training": self.config.expert_training,
            "logs": self.config.logs,
            "chosen": outcome.chosen,
        });
        Report {
            experiment: outcome.name,
            config,
            seeds: self.options.seeds.clone(),
            rows: outcome.rows,
            models: outcome.models,
            seconds,
            table: outcome.table,
        }
    }
}

/// The folder of one FM's store.
fn store_dir(config: &Config, name: &str) -> Result<PathBuf> {
    let dir = config.paths.fm_work.join(name);
    remove_dir(&dir)?;
    Ok(dir)
}

/// The targets of a part with their rows.
fn targets<'a>(part: &Part<'a>) -> impl Iterator<Item = (&'a Example, usize)> + use<'a> {
    let examples = part.examples;
    examples.iter().flat_map(|example| (0..example.targets.len()).map(move |row| (example, row)))
}

/// Where a checkpoint for measuring latency goes.
fn checkpoint_dir(work: &Path, name: &str) -> PathBuf {
    work.join(format!("checkpoint-{name}"))
}
