//! An A/B test in a closed loop (paper section 4.5): FM alone, a one-stage model, FM and expert,
//! and further components as versions that share the users of a real daemon, in a world in which
//! what was ranked decides what is seen, done and learned from.
//!
//! [`world`] has the users, [`deployment`] the daemon and what learns beside it, [`traffic`] runs
//! one through the other, and [`outcomes`] says how the arms differ. [`own_rankers`] stand in for
//! models to say how much there is to gain, and to test that test.

mod deployment;
mod outcomes;
mod own_rankers;
mod traffic;
mod world;

use std::collections::BTreeMap;

use hypercast_core::{atomic_dir, dir_lock::DirLock, shutdown::Shutdown, text_table::TextTable};
use serde_json::{Value, json};

use self::{
    deployment::{AbArm, AbPast, Deployment, PLUGIN},
    outcomes::{AbRow, ArmTotals, DailyOutcomes, FEWEST_USERS, METRICS, UserBaseline},
    own_rankers::{REFERENCES, RUNS, TestSize},
    traffic::{ClosedLoopTraffic, ServedClicks, TrafficCounts},
    world::{ClosedLoopOptions, ClosedLoopWorld, DAY_MS, START_MS},
};
use super::{ExperimentOptions, ExperimentReport};
use crate::{
    demo::{DatasetChoice, StepTimes},
    error::{CommonErrors as _, Error, Result},
};

/// The name of all seeds together.
const ALL_SEEDS: &str = "all";

/// Items on the first day, and the share of them that arrives each day, for each user.
const ITEMS_PER_USER: f64 = 0.8;
const RELEASED_A_DAY: f64 = 0.06;
const FEWEST_ITEMS: usize = 200;

/// The size of an A/B test.
#[derive(Debug, Clone, clap::Args)]
pub struct AbOptions {
    /// ab: users, an equal share of them for each arm
    #[arg(long, value_name = "N", default_value_t = 1500)]
    pub ab_users: usize,
    /// ab: days before the test, from which all models learn first
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub ab_past_days: i64,
    /// ab: days of the test
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub ab_days: i64,
    /// ab: instead, how often equal arms are found to differ, in 100 tests with rankers of the
    /// world itself; no daemon is started
    #[arg(long, conflicts_with_all = ["seeds", "config", "plugins", "variant", "work"])]
    pub equal_arms: bool,
}

impl AbOptions {
    fn size(&self) -> TestSize {
        TestSize { users: self.ab_users, past_days: self.ab_past_days, days: self.ab_days }
    }
}

/// Runs the test for every seed.
pub fn run(options: &ExperimentOptions) -> Result<ExperimentReport> {
    let size = options.ab.size();
    let TestSize { users, past_days, days } = size;
    let arms = deployment::arms(&options.variant)?;
    if users < arms.len() || past_days < 2 || days < 1 {
        return Err(Error::invalid(
            "ab needs a user for each arm (--ab-users), two days of the past (--ab-past-days) and \
             one of the test (--ab-days)",
        ));
    }
    let (times, stop) = (StepTimes::default(), Shutdown::on_signals()?);
    if options.ab.equal_arms {
        let tested = times.time("tests", || own_rankers::test_equal_arms(size, &stop));
        let (table, rows) = tested?;
        let config = json!({
            "equal_arms": true, "users": users, "past_days": past_days, "days": days,
        });
        return Ok(report((0..RUNS).collect(), rows, table, config, &times));
    }
    if users < arms.len() * FEWEST_USERS {
        tracing::warn!(
            "--ab-users {users}: nothing can be said of differences with fewer than \
             {FEWEST_USERS} users an arm"
        );
    }
    let _owner = DirLock::acquire(options.setup.work())?;
    let names: Vec<&str> = arms.iter().map(|arm| arm.name.as_str()).collect();
    let new = || [ArmTotals::new(names.len()), ArmTotals::new(REFERENCES.len())];
    let [mut all, mut all_references] = new();
    let (mut rows, mut settings, mut traffic) = (Vec::new(), Value::Null, BTreeMap::new());
    for &seed in &options.seeds.0 {
        let [mut own, mut references] = new();
        let world = world_options(users, seed);
        let totals = &mut [&mut references, &mut all_references];
        times.time("own rankers", || own_rankers::references(&world, size, totals, &stop))?;
        let ran = run_seed(options, &arms, world, &mut [&mut own, &mut all], &times, &stop)?;
        settings = ran.settings;
        traffic.insert(seed, ran.traffic);
        rows.extend(references.rows(&seed.to_string(), &REFERENCES));
        rows.extend(own.rows(&seed.to_string(), &names));
    }
    rows.extend(all_references.rows(ALL_SEEDS, &REFERENCES));
    rows.extend(all.rows(ALL_SEEDS, &names));
    settings["traffic"] = json!(traffic);
    let mut table = table(&rows, &names, &settings["flops"]) + &predictions(&traffic);
    let spread = by_seed(&rows);
    if !spread.is_empty() {
        table += &format!("\n{spread}");
    }
    let rows = rows.iter().map(|row| json!(row)).collect();
    Ok(report(options.seeds.0.clone(), rows, table, settings, &times))
}

fn world_options(users: usize, seed: u64) -> ClosedLoopOptions {
    let items = ((users as f64 * ITEMS_PER_USER) as usize).max(FEWEST_ITEMS);
    let items_per_day = (items as f64 * RELEASED_A_DAY) as usize;
    ClosedLoopOptions { users, items, items_per_day, seed }
}

/// One test: what it was run with, and what was asked and answered.
struct AbRun {
    settings: Value,
    traffic: TrafficCounts,
}

fn run_seed(
    options: &ExperimentOptions,
    arms: &[AbArm],
    world: ClosedLoopOptions,
    totals: &mut [&mut ArmTotals],
    times: &StepTimes,
    stop: &Shutdown,
) -> Result<AbRun> {
    let TestSize { users, past_days, days } = options.ab.size();
    let ClosedLoopOptions { items, items_per_day, seed, .. } = world;
    let mut world = ClosedLoopWorld::new(world)?;
    let rows = times.time("past", || world.past(past_days))?;
    let baseline = UserBaseline::new(&rows, users, past_days);

    let mut setup = options.setup.clone();
    let work = setup.work().join(format!("seed-{seed}"));
    atomic_dir::remove(&work)?;
    std::fs::create_dir_all(&work).map_err(Error::io(&work))?;
    setup.data = Some(DatasetChoice::Simulated);
    // Processes read paths from a configuration in the work folder.
    setup.work = Some(std::path::absolute(&work).map_err(Error::io(&work))?);
    setup.plugins = std::path::absolute(&setup.plugins).map_err(Error::io(&setup.plugins))?;
    let from_ms = START_MS + past_days * DAY_MS;
    let past = AbPast { world: &world, rows, until_ms: from_ms };
    let mut deployment = Deployment::start(&setup, arms.to_vec(), seed, past, times, stop)?;
    let outcomes = DailyOutcomes::new(seed, deployment.arm_of_user.clone(), baseline);
    let traffic = ClosedLoopTraffic::new(&mut deployment, &mut world, outcomes, stop);
    let ran = times.time("test", || traffic.run(from_ms, days, totals));
    let counts = ran.inspect_err(|_| {
        // The first failure matters more than how the others end.
        if let Err(also) = deployment.stop() {
            tracing::warn!("{also}");
        }
    })?;
    let settings = json!({
        "users": users, "items": items, "items_per_day": items_per_day,
        "past_days": past_days, "days": days, "plugin": PLUGIN, "variants": options.variant,
        "flops": deployment.flops,
        "fm": deployment.config.fm.of_new_model(),
        "expert_training": deployment.config.expert_training,
    });
    times.time("stop", || deployment.stop())?;
    Ok(AbRun { settings, traffic: counts })
}

/// # Errors
/// A stop was requested.
fn check_stop(stop: &Shutdown) -> Result<()> {
    if stop.is_requested() {
        return Err(Error::refused("stopped before its end"));
    }
    Ok(())
}

fn report(
    seeds: Vec<u64>,
    rows: Vec<Value>,
    table: String,
    config: Value,
    times: &StepTimes,
) -> ExperimentReport {
    ExperimentReport {
        experiment: "ab".to_owned(),
        config,
        seeds,
        rows: Vec::new(),
        models: rows,
        laws: Vec::new(),
        seconds: times.seconds(),
        table,
        plot: None,
    }
}

/// A line for each metric, seed and arm, with what it has above the arms before it in per cent.
fn table(rows: &[AbRow], arms: &[&str], flops: &Value) -> String {
    let head = ["metric", "seed", "arm", "mean"].map(String::from);
    let others = &arms[..arms.len() - 1];
    let over = others.iter().map(|arm| format!("over {arm} [95 % sequence]"));
    let mut table = TextTable::new(3, head.into_iter().chain(over));
    for metric in METRICS {
        for row in rows.iter().filter(|row| row.metric == metric) {
            let mean = row.mean.map_or("-".into(), |mean| format!("{mean:.4}"));
            let over = others.iter().map(|arm| match row.over.get(*arm) {
                Some(Some(of)) => {
                    let base = row.mean.unwrap_or(f64::NAN) - of.difference;
                    let [by, low, high] =
                        [of.difference, of.low, of.high].map(|by| 100.0 * by / base);
                    format!("{by:+.1} % [{low:+.1}, {high:+.1}]")
                }
                Some(None) => "too little is known".into(),
                None => String::new(),
            });
            let names = [metric, &row.seed, &row.arm].map(String::from);
            table.line(names.into_iter().chain([mean]).chain(over));
        }
    }
    let cost = |(arm, flops): (&&str, &Value)| format!("{arm} {flops}");
    let flops = arms.iter().zip(flops.as_array().into_iter().flatten()).map(cost);
    format!("{table}\nFLOPs a candidate: {}\n", flops.collect::<Vec<_>>().join(", "))
}

/// How well each arm predicted the clicks on what it showed.
fn predictions(traffic: &BTreeMap<u64, TrafficCounts>) -> String {
    let mut lines = String::new();
    for (seed, counts) in traffic {
        let arm = |(arm, clicks): (&String, &ServedClicks)| {
            let [ne, calibration] = [clicks.ne, clicks.calibration]
                .map(|number| number.map_or("-".into(), |number| format!("{number:.4}")));
            format!("{arm} {ne} (calibration {calibration})")
        };
        let arms: Vec<String> = counts.clicks.iter().map(arm).collect();
        lines += &format!("NE of clicks on what was shown, seed {seed}: {}\n", arms.join(", "));
    }
    lines
}

/// How the differences of seeds vary, each of which has models and a world of its own. The
/// intervals do not have this: they are over the users.
fn by_seed(rows: &[AbRow]) -> TextTable {
    let head = ["metric", "arm", "over", "seeds", "mean difference", "standard deviation"];
    let mut table = TextTable::new(3, head.map(String::from));
    for row in rows.iter().filter(|row| row.seed == ALL_SEEDS) {
        for base in row.over.keys() {
            let is_same = |of: &&AbRow| of.metric == row.metric && of.arm == row.arm;
            let of_seeds = rows.iter().filter(is_same).filter(|of| of.seed != ALL_SEEDS);
            let differences: Vec<f64> =
                of_seeds.filter_map(|of| Some(of.over.get(base)?.as_ref()?.difference)).collect();
            if differences.len() < 2 {
                continue;
            }
            let count = differences.len() as f64;
            let mean = differences.iter().sum::<f64>() / count;
            let squares: f64 = differences.iter().map(|of| (of - mean).powi(2)).sum();
            let deviation = (squares / (count - 1.0)).sqrt();
            let numbers = [format!("{mean:+.4}"), format!("{deviation:.4}")];
            let names = [row.metric, &row.arm, base].map(String::from);
            table.line(names.into_iter().chain([count.to_string()]).chain(numbers));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, Command, FromArgMatches as _};
    use hypercast_serve::metrics::sequential::SequentialDifference;

    use super::*;
    use crate::experiment::ExperimentCommand;

    fn options(words: &[&str]) -> ExperimentOptions {
        let command = ExperimentCommand::augment_args(Command::new("experiment"));
        let matches = command.get_matches_from(["experiment", "ab"].iter().chain(words));
        ExperimentCommand::from_arg_matches(&matches).unwrap().0
    }

    #[test]
    fn a_folder_that_another_test_uses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _owner = DirLock::acquire(dir.path()).unwrap();
        let options = options(&["--work", dir.path().to_str().unwrap()]);
        let message = run(&options).unwrap_err().to_string();
        assert!(message.contains(&std::process::id().to_string()), "{message}");
    }

    #[test]
    fn an_arm_is_not_named_twice() {
        let twice = ["--variant", "boosting", "--variant", "boosting"];
        let message = run(&options(&twice)).unwrap_err().to_string();
        assert!(message.contains("--variant boosting"), "{message}");
    }

    #[test]
    fn equal_arms_of_too_few_users_are_refused() {
        let message = run(&options(&["--equal-arms", "--ab-users", "150"])).unwrap_err();
        assert!(message.to_string().contains("--ab-users 150"), "{message}");
    }

    fn exactly(difference: f64) -> SequentialDifference {
        SequentialDifference { difference, low: difference, high: difference, p: 1.0 }
    }

    #[test]
    fn seeds_have_a_spread_of_their_own() {
        let row = |seed: &str, difference: Option<f64>| AbRow {
            seed: seed.into(),
            metric: METRICS[0],
            arm: "one-stage".into(),
            users: 100,
            rows: 100,
            mean: Some(1.0),
            over: [("FM alone".into(), difference.map(exactly))].into(),
        };
        let rows = [row("1", Some(1.0)), row("2", Some(3.0)), row("3", None), row("all", None)];
        let table = by_seed(&rows).to_string();
        assert!(table.contains("+2.0000") && table.contains("1.4142"), "{table}");
    }
}
