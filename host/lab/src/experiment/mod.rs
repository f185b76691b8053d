//! The paper's experiments (section 4) on any data set: the gain from a TAE, the share of a larger
//! FM's gain that reaches experts, the gain for unseen tasks, the cost of the models, the cost of
//! publishing a part of the weights, how NE falls with training FLOPs, and what each part brings.
//!
//! All arms of a seed share one pass over the stream and one log. They are compared on the same
//! rows, with intervals from a bootstrap over users. Every seed is in the report. `ab` alone is no
//! data set's: there the arms of a daemon decide what users see and do.

mod ab;
mod ablation;
mod compute;
mod latency;
mod mask;
mod option_readers;
mod publish;
mod report;
mod runner;
mod scaling;
mod tae;
#[cfg(test)]
mod tests;
mod transfer;
mod unseen;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::ValueEnum as _;
use hypercast_config::Config;
use hypercast_core::atomic_dir;
use hypercast_data::{dataset::Dataset, logs::LogReader, schema::BinaryLabels};
use hypercast_expert::{Blueprint, Engine, LoadOptions};
use hypercast_fm::{
    spec::{FmConfig, FmSpec},
    trainer::{self, FmTrainer},
};
use serde_json::{Value, json};

pub use self::{
    ab::AbOptions,
    option_readers::ExperimentCommand,
    report::{ExperimentReport, ExperimentRow},
    scaling::{ScalingLaw, ScalingPoint},
};
use self::{
    mask::InputMask,
    report::{ArmPair, SliceTotals},
    runner::ArmRunner,
};
use crate::{
    demo::{DatasetChoice, StepTimes},
    error::{CommonErrors as _, Error, Result},
    evaluate::{
        setup::EvaluationSetup,
        stream::{DatasetStream, TestMode, UserSample, logged_version},
        window::TestWindow,
    },
    tally::ScoreTally,
};

/// The experiments, by the name of their command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Experiment {
    /// Table 1: no embedding, user embedding, TAE, both
    Tae,
    /// Table 2: how much of a larger FM's gain reaches experts, by its TAE and by distillation
    Transfer,
    /// Table 3: tasks of a surface that the FM was never trained on
    Unseen,
    /// FM and expert against a one-stage model: parameters, FLOPs, samples/s, latency
    Compute,
    /// Component-wise publishing: all that moved, a share of it, or nothing, to copies that serve
    Publish,
    /// FM alone, a one-stage model, and FM and expert in a closed loop: what users do under each
    Ab,
    /// NE against training FLOPs over width, depth, history and data; experts of several FM sizes.
    /// Weights are fixed in the test
    Scaling,
    /// FM and expert as they are, and without one part each: what each part brings
    Ablation,
}

/// Reproduce a table of the paper: tae (1), transfer (2), unseen (3), compute, publish, scaling,
/// ablation; or test arms of a daemon: ab
#[derive(Debug, Clone, clap::Args)]
pub struct ExperimentOptions {
    /// The experiment
    #[arg(value_enum)]
    pub experiment: Experiment,
    /// The data set and the folders.
    #[command(flatten)]
    pub setup: EvaluationSetup,
    /// Seeds of FM and experts: how many, or which (`1,2,3`; `7,` for the one)
    #[arg(long, default_value = "3", value_parser = SeedList::parse)]
    pub seeds: SeedList,
    /// The share of users in the experiment [default: 0.3 for movielens, 0.25 for kuairand, 1 for
    /// simulated, what has some 150,000 rows for own]
    #[arg(long, value_name = "SHARE")]
    pub users: Option<f64>,
    /// Replicates of the bootstrap over users
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub replicates: usize,
    /// The expert: the name of a component in the plugins' folder
    #[arg(long, value_name = "NAME", default_value = "mlp-fusion")]
    pub expert: String,
    /// ablation, ab: also this component in the plugins' folder, such as the expert without a part
    /// of its network, or boosting; several are allowed
    #[arg(long, value_name = "NAME")]
    pub variant: Vec<String>,
    /// transfer: also this component, which must be the network of `--expert` and learns the FM's
    /// predictions as soft labels, without the TAE and with it
    #[arg(long, value_name = "NAME")]
    pub student: Option<String>,
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
    /// scaling: also draw the laws as an SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// ab: its size.
    #[command(flatten)]
    pub ab: AbOptions,
}

impl ExperimentOptions {
    /// The data set that is meant; `ab` simulates its own.
    pub fn data(&self) -> DatasetChoice {
        if self.experiment == Experiment::Ab {
            return DatasetChoice::Simulated;
        }
        self.setup.choice()
    }
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

/// Runs an experiment.
///
/// # Errors
/// Options that do not fit the data; the failure of a step.
pub fn run(options: &ExperimentOptions) -> Result<ExperimentReport> {
    if let Some(share) = options.users.filter(|share| !(*share > 0.0 && *share <= 1.0)) {
        return Err(Error::invalid(format!("--users {share}: it must be above 0 and at most 1")));
    }
    if options.seeds.0.is_empty() || options.replicates == 0 {
        return Err(Error::invalid("at least one seed and one replicate are needed"));
    }
    let compare: fn(&ExperimentContext<'_>) -> Result<ExperimentReport> = match options.experiment {
        Experiment::Tae => tae::run,
        Experiment::Transfer => transfer::run,
        Experiment::Unseen => unseen::run,
        Experiment::Compute => compute::run,
        Experiment::Publish => publish::run,
        Experiment::Scaling => scaling::run,
        Experiment::Ablation => ablation::run,
        Experiment::Ab => return ab::run(options),
    };
    // A law is of models, not of how they go on learning.
    let mut options = options.clone();
    if options.experiment == Experiment::Scaling {
        options.setup.mode = TestMode::Fixed;
    }
    let options = &options;
    let times = StepTimes::default();
    let dataset = times.time("import", || options.setup.dataset())?;
    let config = options.setup.config(&dataset)?;
    let share = match options.users {
        Some(share) => share,
        None => options.setup.choice().experiment_share(&dataset)?,
    };
    let context = ExperimentContext {
        window: TestWindow::new(&options.setup, &config, &dataset)?,
        users: UserSample { share, salt: 0 },
        engine: Engine::new(config.guests())?,
        plugin: component(options, &options.expert),
        labels: BinaryLabels::new(&dataset.schema),
        options,
        dataset: &dataset,
        config: &config,
        times,
    };
    compare(&context)
}

/// The file of a component in the plugins' folder.
fn component(options: &ExperimentOptions, name: &str) -> PathBuf {
    options.setup.plugins.join(format!("{name}.wasm"))
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
    times: StepTimes,
}

impl ExperimentContext<'_> {
    /// What `measure` tallies of some arms over the reported part, for every seed in the
    /// configuration.
    fn tallies(
        &self,
        arms: &[&str],
        mut measure: impl FnMut(&Config, &mut ScoreTally) -> Result<()>,
    ) -> Result<Vec<ScoreTally>> {
        let of_seed = |&seed: &u64| {
            let mut config = self.config.clone();
            config.fm.seed = seed;
            config.expert_training.seed = seed;
            let mut tally = ScoreTally::new(&self.labels, self.window.report_from_ms, arms);
            measure(&config, &mut tally)?;
            Ok(tally)
        };
        self.options.seeds.0.iter().map(of_seed).collect()
    }

    /// A new FM with a store of its own.
    fn fm(
        &self,
        config: &Config,
        name: &str,
        fm: &FmConfig,
        spec: &FmSpec,
    ) -> Result<Box<dyn FmTrainer>> {
        let dir = config.paths.fm_work.join(name);
        atomic_dir::remove(&dir)?;
        Ok(trainer::create(&dir, fm, spec, config.device)?)
    }

    /// The stream of a configuration, with `history_len` events of history per example.
    fn stream<'b>(&'b self, config: &'b Config, history_len: usize) -> DatasetStream<'b> {
        DatasetStream {
            dataset: self.dataset,
            config,
            window: self.window,
            mode: self.options.setup.mode,
            history_len,
            users: self.users,
        }
    }

    /// Trains and measures the arms of a seed that read an FM, by its place among those that were
    /// logged.
    fn runner<'b>(&'b self, config: &'b Config, fm: usize) -> Result<ArmRunner<'b>> {
        let log = LogReader::open_for(&config.paths.logs, Some(&logged_version(fm)))?;
        let (plugin, mask) = (self.plugin.clone(), InputMask::default());
        Ok(ArmRunner { context: self, config, log, plugin, mask })
    }

    /// A component as an expert that reads an FM loads it.
    fn blueprint(&self, plugin: &Path) -> Result<Blueprint> {
        let options = LoadOptions {
            tae_dim: self.config.fm.tae_width(),
            fm_version: Some(logged_version(0)),
            ..self.config.load_options("experiment", self.dataset.content)
        };
        Ok(Blueprint::load(&self.engine, plugin, &self.dataset.schema, &options)?)
    }

    /// The folder of a checkpoint for measuring latency.
    fn checkpoint_dir(&self, name: &str) -> PathBuf {
        self.options.setup.work().join(format!("checkpoint-{name}"))
    }

    /// The rows of all arms, compared with the first, on every slice that all arms predict, or only
    /// on those of `surface`.
    fn rows(&self, tallies: &[ScoreTally], surface: Option<u16>) -> Result<Vec<ExperimentRow>> {
        let arms = 0..tallies[0].arms.len();
        let pairs: Vec<_> = arms.map(|arm| ArmPair { baseline: 0, arm }).collect();
        let mut rows = Vec::new();
        for cell in SliceTotals::all(tallies)? {
            if surface.is_none_or(|surface| cell.slice.surface == usize::from(surface)) {
                rows.extend(self.rows_of(&cell, &pairs));
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

    /// The result, with `models` that the experiment measured and the settings that it chose.
    fn report(
        &self,
        table: String,
        rows: Vec<ExperimentRow>,
        models: Vec<Value>,
        chosen: Value,
    ) -> ExperimentReport {
        let experiment = self.options.experiment.to_possible_value().expect("none is hidden");
        let config = json!({
            "data": format!("{:?}", self.options.setup.choice()).to_lowercase(),
            "mode": self.options.setup.mode,
            "test_from": self.window.format(self.window.test_from_ms),
            "report_from": self.window.format(self.window.report_from_ms),
            "users_share": self.users.share,
            "replicates": self.options.replicates,
            "expert": self.options.expert,
            "fm": self.config.fm.of_new_model(),
            "expert_training": self.config.expert_training,
            "logs": self.config.logs,
            "chosen": chosen,
        });
        ExperimentReport {
            experiment: experiment.get_name().to_owned(),
            config,
            seeds: self.options.seeds.0.clone(),
            rows,
            models,
            laws: Vec::new(),
            seconds: self.times.seconds(),
            table,
            plot: None,
        }
    }
}
