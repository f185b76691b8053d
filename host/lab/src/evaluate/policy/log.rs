//! The rows that a policy is evaluated on, with their rewards and propensities: those of a data
//! set, or of feature logs, whose rankings daemons noted.

use std::{ops::RangeInclusive, path::PathBuf, sync::Arc};

use hypercast_config::parse_time_ms;
use hypercast_core::progress::Progress;
use hypercast_data::{
    dataset::{ContextFeatures, Dataset, Impression},
    logs::{LogReader, LoggedRequest},
    schema::{Feature, FeatureKind, MISSING, Schema, category_id, columns_of},
};

use super::PolicyOptions;
use crate::error::{CommonErrors as _, Error, Result};

/// Rows between two looks at the clock.
const PROGRESS_ROWS: u64 = 4096;

/// The context feature with the propensity in a data set, if no other is named.
const DATASET_PROPENSITY: &str = "propensity";

/// What rows of feature logs have beside their context, by the names of the logs' columns.
const LOGGED_PROPENSITY: &str = "ranked:propensity";
const LOGGED_POSITION: &str = "ranked:position";
const LOGGED_ARM: &str = "ranked:arm";

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

/// The rows on which rewards and propensities are known.
pub struct PolicyLog {
    /// With what feature logs have beside the context as further features of it.
    pub schema: Arc<Schema>,
    /// Where the rows are.
    pub path: PathBuf,
    rows: PolicyRows,
    reward: Reward,
    propensity: String,
    /// Its index among the dense context features.
    propensity_column: usize,
    /// Whether rows that have none are left out, as those that nobody ranked are.
    may_lack_propensity: bool,
    /// The only place that counts, and the index of the places among the dense context features.
    position: Option<LoggedPosition>,
    surface: Option<u16>,
    from_ms: i64,
}

/// A place of the answer, and where rows have theirs.
struct LoggedPosition {
    wanted: u32,
    column: usize,
}

/// Rows of a file in the order of requests, or of logs.
enum PolicyRows {
    Dataset(Dataset),
    FeatureLogs(LogReader),
}

/// Rows that do not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Nobody knows their reward.
    pub without_reward: u64,
    /// Nobody knows with which probability they were shown.
    pub without_propensity: u64,
}

impl PolicyLog {
    /// The rows that the options choose.
    ///
    /// # Errors
    /// The folder has neither a data set nor feature logs, or the schema lacks what they name.
    pub fn open(options: &PolicyOptions) -> Result<PolicyLog> {
        let dir = &options.from;
        let is_dataset = !dir.join("log-manifest.json").is_file();
        let (rows, schema, path) = if is_dataset {
            let dataset = Dataset::open(dir)?;
            let schema = dataset.schema.clone();
            (PolicyRows::Dataset(dataset), schema, dir.join("impressions.parquet"))
        } else {
            let logs = LogReader::open_without_tae(dir)?;
            let schema = Arc::new(logged_schema(&logs.schema));
            (PolicyRows::FeatureLogs(logs), schema, dir.clone())
        };
        let of_source = if is_dataset { DATASET_PROPENSITY } else { LOGGED_PROPENSITY };
        let propensity = options.propensity.as_deref().unwrap_or(of_source);
        let numbers = columns_of(&schema.context_features, FeatureKind::Dense);
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
        let surface = surface.transpose()?;
        let position = |wanted: u32| {
            let column = numbers.iter().position(|name| name == LOGGED_POSITION);
            let column = column.ok_or_else(|| {
                Error::invalid("--position is of feature logs; a data set does not have it")
            })?;
            Ok::<_, Error>(LoggedPosition { wanted, column })
        };
        let position = options.position.map(position).transpose()?;
        Ok(PolicyLog {
            path,
            rows,
            reward: Reward::named(&options.reward, &schema)?,
            propensity: propensity.to_owned(),
            propensity_column,
            may_lack_propensity: propensity == LOGGED_PROPENSITY,
            position,
            surface,
            from_ms: from_ms.unwrap_or(i64::MIN),
            schema,
        })
    }

    /// Calls `take` with each row that counts, and returns how many do not.
    ///
    /// # Errors
    /// A file cannot be read, a row has no propensity that is one, or `take` fails.
    pub fn for_each(&self, mut take: impl FnMut(RewardedRow<'_>) -> Result<()>) -> Result<LeftOut> {
        let (mut counted, mut left_out) = (0_u64, LeftOut::default());
        let mut progress = Progress::start("rows of the log", self.rows.count() as u64);
        for (row, number) in self.rows.iter()?.zip(1_u64..) {
            let impression = &row?;
            if number.is_multiple_of(PROGRESS_ROWS) {
                progress.advance(PROGRESS_ROWS, String::new);
            }
            let is_elsewhere = self.surface.is_some_and(|surface| surface != impression.surface);
            let is_early = impression.time_ms < self.from_ms;
            let is_other_place = self
                .position
                .as_ref()
                .is_some_and(|of| impression.context.dense[of.column] != of.wanted as f32);
            if impression.history_only || is_elsewhere || is_early || is_other_place {
                continue;
            }
            let Some(reward) = self.reward.of(impression, &self.schema) else {
                left_out.without_reward += 1;
                continue;
            };
            if self.may_lack_propensity && self.propensity_of(impression).is_nan() {
                left_out.without_propensity += 1;
                continue;
            }
            let propensity = self.propensity(impression, number)?;
            take(RewardedRow { number, impression, reward, propensity })?;
            counted += 1;
        }
        progress.finish(&format!("{counted} with a reward"));
        Ok(left_out)
    }

    fn propensity_of(&self, impression: &Impression) -> f32 {
        impression.context.dense[self.propensity_column]
    }

    fn propensity(&self, impression: &Impression, row: u64) -> Result<f64> {
        const RANGE: RangeInclusive<f32> = f32::MIN_POSITIVE..=1.0;
        let name = &self.propensity;
        let propensity = self.propensity_of(impression);
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

impl PolicyRows {
    /// The number of rows.
    fn count(&self) -> usize {
        match self {
            PolicyRows::Dataset(dataset) => dataset.rows,
            PolicyRows::FeatureLogs(logs) => logs.examples,
        }
    }

    /// The rows, those of a request one after the other.
    fn iter(&self) -> Result<Box<dyn Iterator<Item = Result<Impression>> + '_>> {
        Ok(match self {
            PolicyRows::Dataset(dataset) => {
                Box::new(dataset.impressions()?.map(|row| row.map_err(Error::from)))
            }
            PolicyRows::FeatureLogs(logs) => {
                let context = LoggedContext::new(&logs.schema);
                let rows = logs.iter().map(move |logged| Ok(context.impressions(logged?)));
                Box::new(rows.flat_map(|rows: Result<Vec<Impression>>| match rows {
                    Ok(rows) => rows.into_iter().map(Ok).collect(),
                    Err(error) => vec![Err(error)],
                }))
            }
        })
    }
}

/// The schema of feature logs, with what they say of rankings as features of the context.
fn logged_schema(schema: &Schema) -> Schema {
    let mut schema = schema.clone();
    schema.context_features.extend([
        Feature::new(LOGGED_ARM, FeatureKind::Categorical),
        Feature::new(LOGGED_POSITION, FeatureKind::Dense),
        Feature::new(LOGGED_PROPENSITY, FeatureKind::Dense),
    ]);
    schema
}

/// Where the context features are among the columns of logged targets.
struct LoggedContext {
    ids: Vec<usize>,
    dense: Vec<usize>,
}

impl LoggedContext {
    fn new(schema: &Schema) -> LoggedContext {
        let places = |kind, columns: &[String]| -> Vec<usize> {
            let names = columns_of(&schema.context_features, kind);
            let place = |name: &String| columns.iter().position(|column| column == name);
            names.iter().map(|name| place(name).expect("a column of the schema")).collect()
        };
        LoggedContext {
            ids: places(FeatureKind::Categorical, &schema.id_columns()),
            dense: places(FeatureKind::Dense, &schema.feature_columns()),
        }
    }

    /// The rows of a request, under [`logged_schema`].
    fn impressions(&self, logged: LoggedRequest) -> Vec<Impression> {
        let LoggedRequest { example, ranked, .. } = logged;
        let rows = example.targets.into_iter().zip(ranked).map(|(target, ranked)| {
            let ranked = ranked.as_ref();
            let arm = ranked.map_or(0, |place| category_id(&place.arm));
            let position = ranked.map_or(MISSING, |place| place.position as f32);
            let propensity = ranked.and_then(|place| place.propensity).unwrap_or(MISSING);
            let ids = self.ids.iter().map(|&at| target.ids[at]).chain([arm]);
            let dense = self.dense.iter().map(|&at| target.features[at]);
            let dense = dense.chain([position, propensity]);
            Impression {
                request: example.request,
                time_ms: example.time_ms,
                outcome_ms: example.time_ms,
                user: example.user.id,
                item: target.item.id,
                surface: example.surface,
                outcome: target.outcome,
                context: ContextFeatures { ids: ids.collect(), dense: dense.collect() },
                truth: Vec::new(),
                history_only: false,
            }
        });
        rows.collect()
    }
}
