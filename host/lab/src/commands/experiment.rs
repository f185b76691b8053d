//! `hypercast experiment`: the paper's tables on a data set (see
//! [`crate::experiment`]).

use crate::commands::evaluate::CommonArgs;
use crate::experiment::{Experiment, Options, run as experiment};

/// Reproduce a table of the paper: tae (1), transfer (2), unseen (3), compute, or publish
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which experiment
    #[arg(value_enum)]
    pub experiment: Experiment,
    /// The data set, the test and paths.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Seeds of FM and experts: how many, or which (`1,2,3`; `7,` for the one)
    #[arg(long, value_name = "SEEDS", default_value = "3", value_parser = seeds)]
    pub seeds: Seeds,
    /// The share of users that take part [default: 0.3 for movielens, 0.25 for kuairand, 1 for simulated]
    #[arg(long, value_name = "SHARE")]
    pub users: Option<f64>,
    /// The expert: a component in the plugins' folder
    #[arg(long, value_name = "NAME", default_value = "mlp-fusion")]
    pub expert: String,
    /// Draws of the bootstrap over users
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub replicates: usize,
    /// tae: how old a user embedding is at least
    #[arg(long, value_name = "HOURS", default_value_t = 6.0)]
    pub stale_hours: f64,
    /// publish: minutes of the data set's clock between publications
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0)]
    pub publish_minutes: f64,
    /// unseen, compute: the surface [default: the one with the most impressions]
    #[arg(long, value_name = "NAME")]
    pub surface: Option<String>,
    /// unseen: the one task of the surface that the FM sees [default: the first]
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
}

/// Some seeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seeds(pub Vec<u64>);

/// `3` is how many, `1,5` is which.
fn seeds(text: &str) -> Result<Seeds, String> {
    let number =
        |text: &str| text.trim().parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    if !text.contains(',') {
        let count = number(text)?;
        return match count {
            1..=100 => Ok(Seeds((1..=count).collect())),
            _ => Err(format!("{count} seeds; between 1 and 100 can be run")),
        };
    }
    let listed: Result<Vec<u64>, String> =
        text.split(',').filter(|part| !part.trim().is_empty()).map(number).collect();
    let listed = listed?;
    match listed.is_empty() {
        true => Err("no seed is named".into()),
        false => Ok(Seeds(listed)),
    }
}

/// Runs the experiment and prints its table.
pub fn run(args: Args) -> anyhow::Result<()> {
    let name = format!("experiment-{:?}", args.experiment).to_lowercase();
    let options = Options {
        experiment: args.experiment,
        setup: args.common.setup(&name),
        mode: args.common.mode,
        asked: args.common.asked(),
        seeds: args.seeds.0,
        users: args.users,
        replicates: args.replicates,
        expert: args.expert,
        stale_hours: args.stale_hours,
        publish_minutes: args.publish_minutes,
        surface: args.surface,
        task: args.task,
    };
    args.common.tell(&experiment(&options)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_a_count_or_a_list() {
        assert_eq!(seeds("3").unwrap().0, [1, 2, 3]);
        assert_eq!(seeds("4,9").unwrap().0, [4, 9]);
        assert_eq!(seeds("7,").unwrap().0, [7]);
        assert!(seeds("0").is_err() && seeds("x").is_err() && seeds(",").is_err());
    }
}
