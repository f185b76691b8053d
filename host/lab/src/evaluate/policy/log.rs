//! The rows of a data set that a policy is evaluated on, with their rewards and propensities.

use std::{ops::RangeInclusive, path::PathBuf};

use hypercast_config::parse_time_ms;
use hypercast_core::progress::Progress;
use hypercast_data::{
    dataset::{Dataset, Impression},
    schema::{FeatureKind, Schema, columns_of},
};

use super::PolicyOptions;
use crate::error::{CommonErrors as _, Error, Result};

/// Rows between two looks at the clock.
const PROGRESS_ROWS: u64 = 4096;

/// What counts as a reward.
#[derive(Debug, Clone, Copy)]
enum Reward {
    /// The label of a task, by index.
    Task(usize),
    /// Whether an action happened.
    Action(usize),
    /// The number of a value.
    Value(usize),
}

impl Reward {
    fn named(name: &str, schema: &Schema) -> Result<Reward> {
        let task = || schema.task(name).map(Reward::Task);
        let action = || schema.action(name).map(Reward::Action);
        let value = || schema.value(name).map(Reward::Value);
        task().or_else(action).or_else(value).ok_or_else(|| {
            let tasks: Vec<&str> = schema.tasks.iter().map(|task| task.name.as_str()).collect();
            Error::invalid(format!(
                "--reward {name}: no task, action or value is called so; there are the tasks {}, \
                 the actions {} and the values {}",
                listed(&tasks),
                listed(&schema.actions),
                listed(&schema.values)
            ))
        })
    }

    /// None if nobody knows.
    fn of(self, row: &Impression, schema: &Schema) -> Option<f64> {
        let outcome = &row.outcome;
        match self {
            Reward::Task(task) => schema.label(task, row.surface, outcome).map(f64::from),
            Reward::Action(action) => {
                let is_known = outcome.known >> action & 1 == 1;
                let has_happened = outcome.actions >> action & 1 == 1;
                is_known.then_some(f64::from(u8::from(has_happened)))
            }
            Reward::Value(value) => {
                let value = outcome.values[value];
                (!value.is_nan()).then_some(f64::from(value))
            }
        }
    }
}

fn listed(names: &[impl AsRef<str>]) -> String {
    let names: Vec<&str> = names.iter().map(AsRef::as_ref).collect();
    if names.is_empty() { "(none)".into() } else { names.join(", ") }
}

/// A row that counts.
#[derive(Debug, Clone, Copy)]
pub struct RewardedRow<'a> {
    /// Its number in the file, from 1 on.
    pub number: u64,
    /// All of it.
    pub impression: &'a Impression,
    /// What came of it.
    pub reward: f64,
    /// The probability with which the item was shown.
    pub propensity: f64,
}

/// The rows of a data set on which rewards and propensities are known.
#[derive(Debug)]
pub struct PolicyLog<'a> {
    dataset: &'a Dataset,
    path: PathBuf,
    reward: Reward,
    propensity: String,
    /// Its index among the dense context features.
    propensity_column: usize,
    surface: Option<u16>,
    from_ms: i64,
}

impl PolicyLog<'_> {
    /// The rows that the options choose.
    ///
    /// # Errors
    /// The schema lacks what they name.
    pub fn new<'a>(dataset: &'a Dataset, options: &PolicyOptions) -> Result<PolicyLog<'a>> {
        let schema = &dataset.schema;
        let numbers = columns_of(&schema.context_features, FeatureKind::Dense);
        let propensity = &options.propensity;
        let propensity_column = numbers.iter().position(|name| name == propensity);
        let propensity_column = propensity_column.ok_or_else(|| {
            Error::invalid(format!(
                "--propensity {propensity}: the schema has no dense context feature of this name, \
                 only {}; map the column as one that is `training_only`, and import again",
                listed(&numbers)
            ))
        })?;
        let surface = options.surface.as_ref().map(|name| {
            schema.surface(name).ok_or_else(|| {
                let there = schema.surfaces.join(", ");
                Error::invalid(format!("--surface {name}: there are {there}"))
            })
        });
        let from_ms = options.test_from.as_ref().map(|time| parse_time_ms(time, 0)).transpose()?;
        Ok(PolicyLog {
            dataset,
            path: dataset.dir.join("impressions.parquet"),
            reward: Reward::named(&options.reward, schema)?,
            propensity: propensity.clone(),
            propensity_column,
            surface: surface.transpose()?,
            from_ms: from_ms.unwrap_or(i64::MIN),
        })
    }

    /// Calls `take` with each row, and returns how many have no known reward and were left out.
    ///
    /// # Errors
    /// The file cannot be read, a row has no propensity that is one, or `take` fails.
    pub fn for_each(&self, mut take: impl FnMut(RewardedRow<'_>) -> Result<()>) -> Result<u64> {
        let (mut counted, mut without_reward) = (0_u64, 0);
        let mut progress = Progress::start("rows of the log", self.dataset.rows as u64);
        for (row, number) in self.dataset.impressions()?.zip(1_u64..) {
            let impression = &row?;
            if number.is_multiple_of(PROGRESS_ROWS) {
                progress.advance(PROGRESS_ROWS, String::new);
            }
            let is_elsewhere = self.surface.is_some_and(|surface| surface != impression.surface);
            let is_early = impression.time_ms < self.from_ms;
            if impression.history_only || is_elsewhere || is_early {
                continue;
            }
            let Some(reward) = self.reward.of(impression, &self.dataset.schema) else {
                without_reward += 1;
                continue;
            };
            let propensity = self.propensity(impression, number)?;
            take(RewardedRow { number, impression, reward, propensity })?;
            counted += 1;
        }
        progress.finish(&format!("{counted} with a reward"));
        Ok(without_reward)
    }

    fn propensity(&self, impression: &Impression, row: u64) -> Result<f64> {
        const RANGE: RangeInclusive<f32> = f32::MIN_POSITIVE..=1.0;
        let name = &self.propensity;
        let propensity = impression.context.dense[self.propensity_column];
        if RANGE.contains(&propensity) {
            return Ok(f64::from(propensity));
        }
        let reason = if propensity.is_nan() {
            format!(
                "row {row}: `{name}` is missing; a row counts only with the probability with which \
                 its item was shown, so log it with every impression, or choose with --surface one \
                 that has it"
            )
        } else {
            format!(
                "row {row}: `{name}` is {propensity}, which is no probability above 0 and up to 1; \
                 is it a score, or in per cent?"
            )
        };
        Err(Error::data(&self.path, reason))
    }
}
