//! `hypercast simulate`: a world whose true probabilities are known.

use std::path::PathBuf;

use hypercast_data::simulate::{SimulateOptions, simulate};

/// Simulate a cross-surface world
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The data set directory to make
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// Users
    #[arg(long, default_value_t = 500)]
    pub users: usize,
    /// Items
    #[arg(long, default_value_t = 400)]
    pub items: usize,
    /// Requests, six impressions each
    #[arg(long, default_value_t = 20_000)]
    pub requests: usize,
    /// Surfaces
    #[arg(long, default_value_t = 3)]
    pub surfaces: usize,
    /// The same seed makes the same world
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// Makes the world and prints how well it can be predicted at best.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Args { into, users, items, requests, surfaces, seed } = args;
    let report =
        simulate(&SimulateOptions { into: into.clone(), users, items, requests, surfaces, seed })?;
    print!("{report}");
    println!("written to {}", into.display());
    Ok(())
}
