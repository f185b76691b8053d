//! `hypercast plugin run COMPONENT REQUEST`: one request through a component, without a daemon.
//!
//! What the request leaves out is generated from its id: features of items and users, the history,
//! and the foundation model's embeddings. So it shows a ranking rule and what a network makes of
//! columns; how good a version is, `train` and `replay` tell.

use std::path::{Path, PathBuf};

use anyhow::Context;

use hypercast_data::dataset::content;
use hypercast_harness::{RequestSpec, session::WorldSpec};

use super::read;

/// Arguments of `hypercast plugin run`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The component, as `cargo hypercast build` writes it
    pub component: PathBuf,
    /// The request: a body of `POST /v1/rank`, of which everything may be left out; `candidates`
    /// may be a number, and `history` the number of past events
    pub request: PathBuf,
    /// The schema of the request (`schema.toml` of a data set, beside which its content vectors
    /// are); that of `hypercast simulate` if missing
    #[arg(long, value_name = "FILE")]
    pub schema: Option<PathBuf>,
    /// Its parameters; without any they are random, and only the rule means something
    #[arg(long, value_name = "FILE")]
    pub parameters: Option<PathBuf>,
    /// The width of the foundation model's embedding, 0 without one [default: that of the
    /// parameters, or 64]
    #[arg(long)]
    pub tae_dim: Option<usize>,
}

/// Ranks the request and prints the answer as JSON; the plugin's log lines go to standard error.
pub fn run(args: Args) -> anyhow::Result<()> {
    let request: RequestSpec = serde_json::from_slice(&read(&args.request)?)
        .with_context(|| format!("{} is no request", args.request.display()))?;
    let tae_dim = match (&args.parameters, args.tae_dim) {
        (Some(file), None) => {
            Some(hypercast_expert::SavedParameters::read(file)?.provenance.tae_dim)
        }
        (_, given) => given,
    };
    let dataset = args.schema.as_deref().and_then(Path::parent);
    let content_dim = dataset.map(content::width_in).transpose()?;
    let world = WorldSpec {
        component: args.component,
        schema: args.schema,
        parameters: args.parameters,
        tae_dim,
        content_dim,
        ..WorldSpec::default()
    };
    let expert = world.load().map_err(anyhow::Error::msg)?;
    let answer = expert.rank_spec(&request, None);
    for line in expert.log_lines() {
        eprintln!("{} {}: {}", line.plugin, line.level, line.text);
    }
    println!("{}", serde_json::to_string_pretty(&answer.map_err(anyhow::Error::msg)?)?);
    Ok(())
}
