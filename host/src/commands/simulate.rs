//! `hypercast simulate`: a world whose true probabilities are known.

use std::path::PathBuf;

use hypercast_data::simulate::{SimulateOptions, power_law::simulate_power_law, simulate};

/// What decides the outcomes of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Structure {
    /// Users like a few topics, and their tastes drift
    Topics,
    /// NE falls with a model's size by a power law: a spectrum of dimensions, interests that return
    /// after Pareto lags, effects of sessions and over two hops, items by Zipf
    PowerLaw,
}

/// Simulate a cross-surface world
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The data set directory to make
    #[arg(long, value_name = "DIR")]
    pub into: PathBuf,
    /// What decides the outcomes
    #[arg(long, value_enum, default_value_t = Structure::Topics)]
    pub structure: Structure,
    /// Users
    #[arg(long, default_value_t = 500)]
    pub users: usize,
    /// Items [default: 400, or 100000 for power-law, which is made for 10^5 to 10^6]
    #[arg(long)]
    pub items: Option<usize>,
    /// Requests, six impressions each, or twelve of power-law
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
    let Args { into, structure, users, items, requests, surfaces, seed } = args;
    let (items, simulate): (_, fn(&SimulateOptions) -> _) = match structure {
        Structure::Topics => (items.unwrap_or(400), simulate),
        Structure::PowerLaw => (items.unwrap_or(100_000), simulate_power_law),
    };
    let options = SimulateOptions { into: into.clone(), users, items, requests, surfaces, seed };
    let report = simulate(&options)?;
    print!("{report}");
    println!("written to {}", into.display());
    Ok(())
}
