//! A simulated data set with several surfaces whose true probabilities are known, so that a report
//! can compare a model's NE with the best possible one.
//!
//! Users and items have latent vectors. An item's vector is near its topic's. A user's vector is
//! near those of a few topics, and drifts. Models see neither, only a noisy topic and the users'
//! actions. Outcomes become known after a delay that depends on them.
//!
//! [`power_law`] is another world, in which NE falls with a model's size by a power law.

pub mod power_law;
pub mod vectors;
mod world;

use std::path::PathBuf;

use hypercast_fm::metrics::{LogLossSums, binary_entropy};
use serde::{Deserialize, Serialize};

use self::world::SimulatedWorld;
use crate::dataset::{Entities, Impression, ImpressionWriter, write_entities};
use crate::error::{CommonErrors as _, Error, Result, write_json};
use crate::schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole, ValueRange};

/// The size and the seed of a simulated data set.
#[derive(Debug, Clone)]
pub struct SimulateOptions {
    /// The data set directory to write.
    pub into: PathBuf,
    /// The number of users, at least 1.
    pub users: usize,
    /// The number of items, at least 16.
    pub items: usize,
    /// The number of requests, at least 1; each has six impressions, or twelve of [`power_law`].
    pub requests: usize,
    /// The number of surfaces, from 1 to 1000.
    pub surfaces: usize,
    /// The same seed gives the same data set.
    pub seed: u64,
}

/// How well tasks can be predicted at best: `simulate-report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SimulateReport {
    /// The number of requests written.
    pub requests: u64,
    /// The number of impressions written.
    pub impressions: u64,
    /// The binary tasks.
    pub tasks: Vec<BestTask>,
}

/// How well a binary task can be predicted at best.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BestTask {
    /// The name of the task.
    pub task: String,
    /// The share of positive labels on the surfaces where it is valid.
    pub rate: f64,
    /// The normalised entropy of the true probabilities: their expected log loss over that of the
    /// constant base rate.
    pub best_ne: f64,
    /// The number of impressions with a label.
    pub impressions: u64,
}

/// Simulates a data set and writes it with its report.
///
/// # Errors
/// An option is outside its range, or the file system fails.
pub fn simulate(options: &SimulateOptions) -> Result<SimulateReport> {
    options.check()?;
    let schema = schema(options.surfaces);
    let mut world = SimulatedWorld::new(options);
    let entities =
        Entities { schema: &schema, items: &world.items(), item_names: &[], users: &world.users() };
    write_world(options, &entities, |request| world.request(request))
}

/// Writes a world with its report: users and items, and the impressions of one request after the
/// other, as `request` makes them.
fn write_world(
    options: &SimulateOptions,
    entities: &Entities<'_>,
    mut request: impl FnMut(u64) -> Vec<Impression>,
) -> Result<SimulateReport> {
    let schema = entities.schema;
    write_entities(&options.into, entities)?;
    let mut writer = ImpressionWriter::create(&options.into, schema);
    let mut sums = vec![LogLossSums::default(); schema.tasks.len()];
    let mut impressions = 0;
    for number in 1..=options.requests as u64 {
        for row in request(number) {
            for (task, sums) in sums.iter_mut().enumerate() {
                if let Some(label) = schema.label(task, row.surface, &row.outcome) {
                    sums.count += 1;
                    sums.positives += u64::from(label == 1.0);
                    // The expected log loss of the true probability is its entropy.
                    sums.log_loss += binary_entropy(f64::from(row.truth[task]));
                }
            }
            writer.write(&row)?;
            impressions += 1;
        }
    }
    writer.finish()?;
    let tasks = schema.tasks.iter().zip(&sums);
    let binary = tasks.filter(|(task, _)| task.kind == TaskKind::Binary);
    let best = |(task, sums): (&Task, &LogLossSums)| BestTask {
        task: task.name.clone(),
        rate: sums.positives as f64 / sums.count as f64,
        best_ne: sums.normalized_entropy().unwrap_or(f64::NAN),
        impressions: sums.count,
    };
    let tasks = binary.map(best).collect();
    let report = SimulateReport { requests: options.requests as u64, impressions, tasks };
    write_json(&options.into.join("simulate-report.json"), &report)?;
    Ok(report)
}

impl SimulateOptions {
    fn check(&self) -> Result<()> {
        let ranges = [
            ("users", self.users, 1..=usize::MAX),
            ("items", self.items, 16..=usize::MAX),
            ("requests", self.requests, 1..=usize::MAX),
            ("surfaces", self.surfaces, 1..=1000),
        ];
        for (name, value, range) in ranges {
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                let limit = if value < least { "least" } else { "most" };
                let bound = value.clamp(least, most);
                let reason = format!("--{name} is {value}; it must be at {limit} {bound}");
                return Err(Error::invalid(reason));
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for SimulateReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "{} requests, {} impressions", self.requests, self.impressions)?;
        for task in &self.tasks {
            writeln!(
                f,
                "{}: rate {:.4}, best possible NE {:.4}",
                task.task, task.rate, task.best_ne
            )?;
        }
        Ok(())
    }
}

/// The schema of a simulated data set with `surfaces` surfaces.
pub fn schema(surfaces: usize) -> Schema {
    let keys: [&[&str]; 6] = [
        &["user_id"],
        &["item_id"],
        &["topic"],
        &["user_id", "topic"],
        &["user_id", "creator"],
        &["item_id", "surface"],
    ];
    let mut finish = Task::of_label("finish", TaskRole::Auxiliary, TaskKind::Binary);
    finish.surfaces = vec![surface_name(0)];
    Schema {
        surfaces: (0..surfaces).map(surface_name).collect(),
        actions: ["click", "like", "finish"].map(String::from).to_vec(),
        values: vec!["watch".into()],
        tasks: vec![
            Task::of_label("click", TaskRole::Main, TaskKind::Binary),
            Task::of_label("like", TaskRole::Main, TaskKind::Binary),
            finish,
            Task::of_label("watch", TaskRole::Auxiliary, TaskKind::Regression),
        ],
        item_features: Feature::mixed(&["topic", "creator"], &["length"]),
        user_features: Feature::list(&["age_group"], FeatureKind::Categorical),
        context_features: Feature::mixed(&["device"], &["battery"]),
        counters: Counter::lasting(&keys, &["click", "like"]),
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: vec![
            ValueRange::new("watch", 0.0, 1.0),
            ValueRange::new("length", -6.0, 6.0),
            ValueRange::new("battery", 0.0, 1.0),
        ],
    }
}

fn surface_name(index: usize) -> String {
    const NAMES: [&str; 3] = ["feed", "search", "stories"];
    NAMES.get(index).map_or_else(|| format!("surface{index}"), |name| name.to_string())
}

#[cfg(test)]
mod tests;
