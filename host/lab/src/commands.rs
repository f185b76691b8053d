//! The commands of `hypercast-lab`: what their options mean for the library, and the printing of
//! their reports.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use anyhow::Context;
use hypercast_core::atomic_file;
use serde::Serialize;

use crate::{
    bench::{self, BenchOptions},
    demo::{self, DatasetChoice, DemoOptions, streaming},
    evaluate::{
        self, EvaluateOptions,
        policy::{self, PolicyOptions},
    },
    experiment::{self, ExperimentCommand},
};

/// A command with its options.
#[derive(Debug, clap::Subcommand)]
#[allow(missing_docs, reason = "help is that of the options; text here would replace it")]
pub enum LabCommand {
    Demo(DemoOptions),
    Evaluate(EvaluateCommand),
    Experiment(ExperimentCommand),
    Bench(BenchOptions),
}

/// Train FM and experts up to a date, and measure them on the data after it; or evaluate a policy
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct EvaluateCommand {
    /// What else is evaluated.
    #[command(subcommand)]
    pub subject: Option<EvaluateSubject>,
    /// Of FM and experts.
    #[command(flatten)]
    pub options: EvaluateOptions,
}

/// What is evaluated besides FM and experts.
#[derive(Debug, clap::Subcommand)]
#[allow(missing_docs, reason = "help is that of the options; text here would replace it")]
pub enum EvaluateSubject {
    Policy(PolicyOptions),
}

/// Runs a command and prints its report.
///
/// # Errors
/// Those of the command; a report that cannot be written.
pub fn run(command: LabCommand) -> anyhow::Result<()> {
    match command {
        LabCommand::Demo(mut options) => {
            let kind = if options.streaming { "streaming" } else { "demo" };
            let work = options.work.unwrap_or_else(|| default_work(kind, options.source.choice()));
            // The configuration is written into the work folder, and its paths are relative to it.
            options.work = Some(std::path::absolute(work)?);
            options.plugins = std::path::absolute(options.plugins)?;
            if !options.streaming {
                return print_report(&demo::run(&options)?, options.json.as_deref());
            }
            let report = streaming::run(&options)?;
            println!();
            print_report(&report, options.json.as_deref())
        }
        LabCommand::Evaluate(EvaluateCommand {
            subject: Some(EvaluateSubject::Policy(options)),
            ..
        }) => print_report(&policy::run(&options)?, options.json.as_deref()),
        LabCommand::Evaluate(EvaluateCommand { mut options, subject: None }) => {
            let data = options.setup.choice();
            options.setup.work.get_or_insert_with(|| default_work("evaluate", data));
            let report = evaluate::run(&options)?;
            if let Some(path) = &options.plot {
                atomic_file::write(path, report.plot().as_bytes())
                    .with_context(|| format!("writing --plot {}", path.display()))?;
            }
            print_report(&report, options.setup.json.as_deref())
        }
        LabCommand::Experiment(ExperimentCommand(mut options)) => {
            let name = format!("experiment-{:?}", options.experiment);
            let data = options.data();
            options.setup.work.get_or_insert_with(|| default_work(&name, data));
            let report = experiment::run(&options)?;
            if let (Some(path), Some(plot)) = (&options.plot, &report.plot) {
                atomic_file::write(path, plot.as_bytes())
                    .with_context(|| format!("writing --plot {}", path.display()))?;
            }
            print_report(&report, options.setup.json.as_deref())
        }
        LabCommand::Bench(options) => print_report(&bench::run(&options)?, options.json.as_deref()),
    }
}

/// The default work folder of a command on a data set.
fn default_work(command: &str, data: DatasetChoice) -> PathBuf {
    let name = format!("{command}-{data:?}").to_lowercase();
    Path::new("target/hypercast").join(name)
}

/// Prints a report, and writes it to `json` if given.
fn print_report(report: &(impl Serialize + Display), json: Option<&Path>) -> anyhow::Result<()> {
    print!("{report}");
    if let Some(path) = json {
        atomic_file::write(path, &serde_json::to_vec_pretty(report)?)
            .with_context(|| format!("writing --json {}", path.display()))?;
    }
    Ok(())
}
