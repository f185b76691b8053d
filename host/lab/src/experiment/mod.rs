//! The paper's experiments (section 4) on any data set: the gain from a TAE, the share of a larger
//! FM's gain that reaches experts, the gain for unseen tasks, the cost of the models, and the cost
//! of publishing a part of the weights.
//!
//! All arms of a seed share one FM pass and one log. They are compared on the same rows, with
//! intervals from a bootstrap over users. Every seed is in the report.

mod bootstrap;
mod compute;
mod latency;
mod publish;
mod report;
mod runner;
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

use hypercast_config::Config;
use hypercast_data::{
    dataset::Dataset,
    logs::{LogReader, LogVersion, LogWriter},
    schema::BinaryLabels,
};
use hypercast_expert::Engine;
use hypercast_fm::example::Example;
use hypercast_train::fm::{FIRST_VERSION, log_writer, remove_dir};
use serde_json::{Value, json};

pub use self::report::{ExperimentReport, ExperimentRow, SeedLabel};
use self::{
    report::{ArmPair, SeedResults},
    runner::ArmRunner,
    tally::{ScoreTally, TargetRow},
};
use crate::{
    demo::{DatasetChoice, StepTimes},
    error::{CommonErrors as _, Error, Result},
    evaluate::{
        setup::EvaluationSetup,
        stream::{DatasetStream, StreamBatch, TestMode, UserSample},
        window::{TestTimes, TestWindow},
    },
};

/// The experiments, by the name of their command.
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

/// Reproduce a table of the paper: tae (1), transfer (2), unseen (3), compute, or publish
#[derive(Debug, Clone, clap::Args)]
pub struct ExperimentOptions {
    /// The experiment
    #[arg(value_enum)]
    pub experiment: Experiment,
    /// The data set and the folders.
    #[command(flatten)]
    pub setup: EvaluationSetup,
    /// Whether weights stay fixed from --test-from on, or go on learning (predict, then train)
    #[arg(long, value_enum, default_value_t = TestMode::Streaming)]
    pub mode: TestMode,
    /// Where the test and the report begin.
    #[command(flatten)]
    pub times: TestTimes,
    /// Seeds of FM and experts: how many, or which (`1,2,3`; `7,` for the one)
    #[arg(long, default_value = "3", value_parser = SeedList::parse)]
    pub seeds: SeedList,
    /// The share of users in the experiment [default: 0.3 for movielens, 0.25 for kuairand, 1 for
    /// simulated]
    #[arg(long, value_name = "SHARE")]
    pub users: Option<f64>,
    /// Replicates of the bootstrap over users
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub replicates: usize,
    /// The expert: the name of a component in the plugins' folder
    #[arg(long, value_name = "NAME", default_value = "mlp-fusion")]
    pub expert: String,
    /// tae: the least age of a user embedding
    #[arg(long, value_name = "HOURS", default_value_t = 6.0)]
    pub stale_hours: f64,
    /// publish: minutes of the data set's clock between publications
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0)]
    pub publish_minutes: f64,
    /// unseen, compute: the surface [default: the one with the most impressions]
    #[arg(long, value_name = "NAME")]
    pub surface: Option<String>,
    /// unseen: the only task of the surface that the FM learns [default: the first]
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
    /// Also write the result to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// The seeds of an experiment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedList(pub Vec<u64>);

impl SeedList {
    /// `3` is how many, `1,5` is which.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let number =
            |text: &str| text.trim().parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
        if !text.contains(',') {
            return match number(text)? {
                count @ 1..=100 => Ok(SeedList((1..=count).collect())),
                count => Err(format!("{count} seeds; the range is 1 to 100")),
            };
        }
        let parts = text.split(',').filter(|part| !part.trim().is_empty());
        let seeds = parts.map(number).collect::<std::result::Result<Vec<u64>, String>>()?;
        if seeds.is_empty() { Err("no seed is given".into()) } else { Ok(SeedList(seeds)) }
    }
}

/// The share of users with which an experiment of three seeds takes a quarter of an hour on two
/// cores.
pub fn default_users(data: DatasetChoice) -> f64 {
    match data {
        DatasetChoice::Movielens => 0.3,
        DatasetChoice::Kuairand => 0.25,
        DatasetChoice::Simulated => 1.0,
    }
}

/// Runs an experiment.
///
/// # Errors
/// Options that do not fit the data; the failure of a step.
pub fn run(options: &ExperimentOptions) -> Result<ExperimentReport> {
    let share = options.users.unwrap_or_else(|| default_users(options.setup.data));
    if !(share > 0.0 && share <= 1.0) {
        return Err(Error::invalid(format!("--users {share}: it must be above 0 and at most 1")));
    }
    if options.seeds.0.is_empty() || options.replicates == 0 {
        return Err(Error::invalid("at least one seed and one replicate are needed"));
    }
    let mut times = StepTimes::default();
    let dataset = times.time("import", || options.setup.dataset())?;
    let config = options.setup.config(&dataset)?;
    std::fs::create_dir_all(options.setup.work()).map_err(Error::io(options.setup.work()))?;
    let context = ExperimentContext {
        window: TestWindow::new(options.setup.data, &options.times, &config, &dataset)?,
        users: UserSample { share, salt: 0 },
        engine: Engine::new(config.guests())?,
        plugin: options.setup.plugins.join(format!("{}.wasm", options.expert)),
        labels: BinaryLabels::new(&dataset.schema),
        options,
        dataset: &dataset,
        config: &config,
    };
    let outcome = match options.experiment {
        Experiment::Tae => tae::run(&context, &mut times),
        Experiment::Transfer => transfer::run(&context, &mut times),
        Experiment::Unseen => unseen::run(&context, &mut times),
        Experiment::Compute => compute::run(&context, &mut times),
        Experiment::Publish => publish::run(&context, &mut times),
    }?;
    Ok(context.report(outcome, times.0))
}

/// The result of an experiment.
struct ExperimentOutcome {
    name: &'static str,
    rows: Vec<ExperimentRow>,
    models: Vec<Value>,
    table: String,
    /// Settings besides the common ones.
    chosen: Value,
}

/// What all experiments need.
struct ExperimentContext<'a> {
    options: &'a ExperimentOptions,
    dataset: &'a Dataset,
    config: &'a Config,
    window: TestWindow,
    users: UserSample,
    engine: Engine,
    plugin: PathBuf,
    labels: BinaryLabels,
}

impl ExperimentContext<'_> {
    /// The configuration with a seed.
    fn seeded(&self, seed: u64) -> Config {
        let mut config = self.config.clone();
        config.fm.seed = seed;
        config.expert_training.seed = seed;
        config
    }

    /// The stream of a configuration, with `history_len` events of history per example.
    fn stream<'b>(&'b self, config: &'b Config, history_len: usize) -> DatasetStream<'b> {
        DatasetStream {
            dataset: self.dataset,
            config,
            window: self.window,
            mode: self.options.mode,
            history_len,
            users: self.users,
        }
    }

    /// An empty log for embeddings of `width` values.
    fn log(&self, config: &Config, width: usize) -> Result<LogWriter> {
        remove_dir(&config.paths.logs)?;
        let versions = vec![LogVersion::new(FIRST_VERSION, width)];
        Ok(log_writer(&self.dataset, config, versions)?)
    }

    /// Trains and measures the arms of a seed.
    fn runner<'b>(&'b self, config: &'b Config, log: &'b LogReader) -> ArmRunner<'b> {
        ArmRunner {
            config,
            log,
            engine: &self.engine,
            plugin: &self.plugin,
            window: self.window,
            mode: self.options.mode,
        }
    }

    /// Empty sums for some arms over the reported part.
    fn tally(&self, arms: &[&str]) -> ScoreTally {
        ScoreTally::new(&self.labels, self.window.report_from_ms, arms)
    }

    /// The sums of all seeds.
    fn results<'b>(&'b self, tallies: &'b [ScoreTally]) -> SeedResults<'b> {
        SeedResults {
            schema: &self.dataset.schema,
            tallies,
            seeds: &self.options.seeds.0,
            replicates: self.options.replicates,
        }
    }

    /// The rows of some pairs on every slice that all arms predict, or only on those of `surface`.
    fn rows(
        &self,
        tallies: &[ScoreTally],
        pairs: &[ArmPair],
        surface: Option<u16>,
        times: &mut StepTimes,
    ) -> Result<Vec<ExperimentRow>> {
        let results = self.results(tallies);
        let mut rows = Vec::new();
        for cell in results.cells()? {
            if surface.is_none_or(|surface| cell.slice.surface == usize::from(surface)) {
                rows.extend(times.time("bootstrap", || Ok(results.rows(&cell, pairs)))?);
            }
        }
        Ok(rows)
    }

    /// The given surface, or the one with the most impressions before the test.
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

    fn report(
        &self,
        outcome: ExperimentOutcome,
        seconds: BTreeMap<String, f64>,
    ) -> ExperimentReport {
        let config = json!({
            "data": format!("{:?}", self.options.setup.data).to_lowercase(),
            "mode": self.options.mode,
            "test_from": self.window.format(self.window.test_from_ms),
            "report_from": self.window.format(self.window.report_from_ms),
            "users_share": self.users.share,
            "replicates": self.options.replicates,
            "expert": self.options.expert,
            "fm": self.config.fm,
            "expert_training": self.config.expert_training,
            "logs": self.config.logs,
            "chosen": outcome.chosen,
        });
        ExperimentReport {
            experiment: outcome.name,
            config,
            seeds: self.options.seeds.0.clone(),
            rows: outcome.rows,
            models: outcome.models,
            seconds,
            table: outcome.table,
        }
    }
}

/// An empty folder for one FM's store.
fn store_dir(config: &Config, name: &str) -> Result<PathBuf> {
    let dir = config.paths.fm_work.join(name);
    remove_dir(&dir)?;
    Ok(dir)
}

/// The targets of a batch.
fn targets<'a>(part: &StreamBatch<'a>) -> impl Iterator<Item = TargetRow<'a>> + use<'a> {
    let rows = |example: &'a Example| {
        (0..example.targets.len()).map(move |row| TargetRow { example, row })
    };
    part.examples.iter().flat_map(rows)
}

/// The folder of a checkpoint for measuring latency.
fn checkpoint_dir(work: &Path, name: &str) -> PathBuf {
    work.join(format!("checkpoint-{name}"))
}
