//! `hypercast evaluate`: FM and experts over a data set's test, fixed or
//! streaming (see [`crate::evaluate`]).

use std::{fmt::Display, path::PathBuf};

use anyhow::Context;
use serde::Serialize;

use crate::demo::Data;
use crate::evaluate::{
    Options, run as evaluate, setup::Setup, stream::Mode, window::Asked, work_name,
};

/// Train FM and experts up to a date, and measure them from there on
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The data set, the test and paths.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Also draw progressive NE over the stream, as SVG
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
    /// Hours between the plot's points
    #[arg(long, value_name = "HOURS", default_value_t = 6)]
    pub window_h: u32,
    /// Seed of FM and experts, instead of the preset's
    #[arg(long)]
    pub seed: Option<u64>,
    /// Take the FM's part from an earlier run with the same FM settings in the work folder
    #[arg(long)]
    pub skip_fm: bool,
}

/// What `evaluate` and `experiment` share: the data, the test, and where results go.
#[derive(Debug, Clone, clap::Args)]
pub struct CommonArgs {
    /// The data set
    #[arg(long, value_enum, default_value_t = Data::Kuairand)]
    pub data: Data,
    /// The data set's own files: their folder (kuairand), the wheel or its folder (movielens); or a folder that was imported
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// A TOML file whose [fm], [expert_training], [features] and [logs] keys replace the preset's
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// Where everything is written [default: target/hypercast/COMMAND-DATA]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Whether weights stay as they are at --test-from, or go on learning (predict, then train)
    #[arg(long, value_enum, default_value_t = Mode::Streaming)]
    pub mode: Mode,
    /// Where the test begins: a date or milliseconds [default: 2022-04-29 for kuairand, else the last tenth]
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Where the report begins [default: where the test does]
    #[arg(long, value_name = "TIME")]
    pub report_from: Option<String>,
    /// Also write the result here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

impl CommonArgs {
    /// As the library takes it; `command` names the default work folder.
    pub fn setup(&self, command: &str) -> Setup {
        let work = self.work.clone().unwrap_or_else(|| work_name(command, self.data));
        let Self { data, from, config, plugins, .. } = self.clone();
        Setup { data, from, work, plugins, config, reuse_data: false }
    }

    /// The test's times as the library takes them.
    pub fn asked(&self) -> Asked {
        Asked { test_from: self.test_from.clone(), report_from: self.report_from.clone() }
    }

    /// Prints a report, and writes it where it was asked for.
    pub fn tell(&self, report: &(impl Serialize + Display)) -> anyhow::Result<()> {
        print!("{report}");
        if let Some(path) = &self.json {
            std::fs::write(path, serde_json::to_vec_pretty(report)?)
                .with_context(|| format!("writing --json {}", path.display()))?;
        }
        Ok(())
    }
}

/// Evaluates and prints the table.
pub fn run(args: Args) -> anyhow::Result<()> {
    let options = Options {
        setup: args.common.setup("evaluate"),
        mode: args.common.mode,
        asked: args.common.asked(),
        seed: args.seed,
        skip_fm: args.skip_fm,
        window_h: args.window_h,
    };
    let report = evaluate(&options)?;
    args.common.tell(&report)?;
    if let Some(path) = args.plot {
        std::fs::write(&path, report.plot())
            .with_context(|| format!("writing --plot {}", path.display()))?;
    }
    Ok(())
}
