//! `hypercast-lab experiment` (see [`crate::experiment`]).

use super::{evaluate::CommonArgs, print_report};
use crate::experiment::{self, Experiment, ExperimentOptions};

/// Reproduce a table of the paper: tae (1), transfer (2), unseen (3), compute, or publish
#[derive(Debug, clap::Args)]
pub struct ExperimentArgs {
    /// Which experiment
    #[arg(value_enum)]
    pub experiment: Experiment,
    /// The data set, the test and paths.
    #[command(flatten)]
    pub common: CommonArgs,
    /// Seeds of FM and experts: how many, or which (`1,2,3`; `7,` for the one)
    #[arg(long, value_name = "SEEDS", default_value = "3", value_parser = seeds)]
    pub seeds: SeedList,
    /// The share of users in the experiment [default: 0.3 for movielens, 0.25 for kuairand, 1 for
    /// simulated]
    #[arg(long, value_name = "SHARE")]
    pub users: Option<f64>,
    /// The expert: the name of a component in the plugins' folder
    #[arg(long, value_name = "NAME", default_value = "mlp-fusion")]
    pub expert: String,
    /// Draws of the bootstrap over users
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub replicates: usize,
    /// tae: the least age of a user embedding
    #[arg(long, value_name = "HOURS", default_value_t = 6.0)]
    pub stale_hours: f64,
    /// publish: minutes of the data set's clock between publications
    #[arg(long, value_name = "MINUTES", default_value_t = 30.0)]
    pub publish_minutes: f64,
    /// unseen, compute: the surface [default: the one with the most impressions]
    #[arg(long, value_name = "NAME")]
    pub surface: Option<String>,
    /// unseen: the only task of the surface that the FM learns [default: the first]
    #[arg(long, value_name = "NAME")]
    pub task: Option<String>,
}

/// The seeds of an experiment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeedList(pub Vec<u64>);

/// `3` is how many, `1,5` is which.
fn seeds(text: &str) -> Result<SeedList, String> {
    let number =
        |text: &str| text.trim().parse::<u64>().map_err(|error| format!("{text:?}: {error}"));
    if !text.contains(',') {
        let count = number(text)?;
        return match count {
            1..=100 => Ok(SeedList((1..=count).collect())),
            _ => Err(format!("{count} seeds; between 1 and 100 can be run")),
        };
    }
    let listed: Result<Vec<u64>, String> =
        text.split(',').filter(|part| !part.trim().is_empty()).map(number).collect();
    let listed = listed?;
    if listed.is_empty() { Err("no seed is given".into()) } else { Ok(SeedList(listed)) }
}

/// Runs the experiment and prints its table.
pub fn run(args: ExperimentArgs) -> anyhow::Result<()> {
    let name = format!("experiment-{:?}", args.experiment).to_lowercase();
    let options = ExperimentOptions {
        experiment: args.experiment,
        setup: args.common.setup(&name),
        mode: args.common.mode,
        times: args.common.times(),
        seeds: args.seeds.0,
        users: args.users,
        replicates: args.replicates,
        expert: args.expert,
        stale_hours: args.stale_hours,
        publish_minutes: args.publish_minutes,
        surface: args.surface,
        task: args.task,
    };
    print_report(&experiment::run(&options)?, args.common.json.as_deref())
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
