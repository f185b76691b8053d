//! A simulated cross-surface world whose true probabilities are known, so that a
//! report can show the best possible NE beside a model's.
//!
//! Users and items have latent vectors. An item's lies near its topic's, a
//! user's near those of the few topics that he likes, and drifts. Models see
//! neither: they see a noisy topic, and what users did. Outcomes become known
//! after a delay that depends on what happened.

mod world;

use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use self::world::World;
use super::{counters, features, task};
use crate::dataset::{Entities, Impression, ImpressionWriter, write_entities};
use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::{FeatureKind, Schema, TaskKind, TaskRole};

/// How large a world, and which.
#[derive(Debug, Clone)]
pub struct Options {
    /// The data set directory to make.
    pub into: PathBuf,
    /// Users.
    pub users: usize,
    /// Items, at least 16.
    pub items: usize,
    /// Requests, six impressions each.
    pub requests: usize,
    /// Surfaces.
    pub surfaces: usize,
    /// The same seed makes the same world.
    pub seed: u64,
}

/// What can be known about the world, `simulate-report.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SimulateReport {
    /// Requests written.
    pub requests: u64,
    /// Impressions written.
    pub impressions: u64,
    /// Each binary task.
    pub tasks: Vec<BestTask>,
}

/// How well a binary task can be predicted at best.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BestTask {
    /// The task.
    pub task: String,
    /// The mean of its labels where it is valid.
    pub rate: f64,
    /// The normalised entropy of the true probabilities: expected log loss over that of the constant base rate.
    pub best_ne: f64,
    /// On how many impressions.
    pub impressions: u64,
}

/// Makes a world.
pub fn simulate(options: &Options) -> Result<SimulateReport> {
    options.check()?;
    let schema = schema(options.surfaces);
    let mut world = World::new(options);
    let entities =
        Entities { schema: &schema, items: &world.items(), item_names: &[], users: &world.users() };
    write_entities(&options.into, &entities)?;
    let mut writer = ImpressionWriter::create(&options.into, &schema)?;
    let mut entropies = vec![Entropy::default(); schema.tasks.len()];
    let mut impressions = 0;
    for request in 0..options.requests as u64 {
        for row in world.request(request + 1) {
            for (task, entropy) in entropies.iter_mut().enumerate() {
                entropy.add(&schema, task, &row);
            }
            writer.write(&row)?;
            impressions += 1;
        }
    }
    writer.finish()?;
    let binary =
        schema.tasks.iter().zip(&entropies).filter(|(task, _)| task.kind == TaskKind::Binary);
    let tasks = binary.map(|(task, entropy)| entropy.best(&task.name)).collect();
    let report = SimulateReport { requests: options.requests as u64, impressions, tasks };
    let path = options.into.join("simulate-report.json");
    let text = serde_json::to_string_pretty(&report)
        .map_err(|error| Error::data(&path, error.to_string()))?;
    fs::write(&path, text + "\n").map_err(Error::io(&path))?;
    Ok(report)
}

impl Options {
    fn check(&self) -> Result<()> {
        let at_least = |name: &str, value: usize, least: usize| match value >= least {
            true => Ok(()),
            false => Err(Error::invalid(format!("--{name} {value}: at least {least} are needed"))),
        };
        at_least("users", self.users, 1)?;
        at_least("items", self.items, 16)?;
        at_least("requests", self.requests, 1)?;
        at_least("surfaces", self.surfaces, 1)?;
        match self.surfaces <= 1000 {
            true => Ok(()),
            false => Err(Error::invalid(format!(
                "--surfaces {}: at most 1000 are possible",
                self.surfaces
            ))),
        }
    }
}

/// Sums for the entropy of the true probabilities and of the base rate.
#[derive(Debug, Clone, Copy, Default)]
struct Entropy {
    impressions: u64,
    positives: u64,
    nats: f64,
}

impl Entropy {
    fn add(&mut self, schema: &Schema, task: usize, row: &Impression) {
        let Some(action) = schema.action(&schema.tasks[task].label) else {
            return;
        };
        if schema.task_valid(task, row.surface) && row.outcome.known >> action & 1 == 1 {
            self.impressions += 1;
            self.positives += u64::from(row.outcome.actions >> action & 1);
            self.nats += binary_entropy(f64::from(row.truth[task]));
        }
    }

    fn best(&self, task: &str) -> BestTask {
        let n = self.impressions as f64;
        let rate = self.positives as f64 / n;
        BestTask {
            task: task.to_string(),
            rate,
            best_ne: self.nats / n / binary_entropy(rate),
            impressions: self.impressions,
        }
    }
}

fn binary_entropy(p: f64) -> f64 {
    -(p * p.ln() + (1.0 - p) * (1.0 - p).ln())
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

/// The schema of a world with so many surfaces.
pub fn schema(surfaces: usize) -> Schema {
    const NAMES: [&str; 3] = ["feed", "search", "stories"];
    let surface = |index: usize| {
        NAMES.get(index).map_or_else(|| format!("surface{index}"), |name| name.to_string())
    };
    let mut item_features = features(&["topic", "creator"], FeatureKind::Categorical);
    item_features.extend(features(&["length"], FeatureKind::Dense));
    let mut context_features = features(&["device"], FeatureKind::Categorical);
    context_features.extend(features(&["battery"], FeatureKind::Dense));
    let keys: [&[&str]; 6] = [
        &["user_id"],
        &["item_id"],
        &["topic"],
        &["user_id", "topic"],
        &["user_id", "creator"],
        &["item_id", "surface"],
    ];
    let mut finish = task("finish", TaskRole::Auxiliary, TaskKind::Binary);
    finish.surfaces = vec![surface(0)];
    Schema {
        surfaces: (0..surfaces).map(surface).collect(),
        actions: ["click", "like", "finish"].map(String::from).to_vec(),
        values: vec!["watch".into()],
        tasks: vec![
            task("click", TaskRole::Main, TaskKind::Binary),
            task("like", TaskRole::Main, TaskKind::Binary),
            finish,
            task("watch", TaskRole::Auxiliary, TaskKind::Regression),
        ],
        item_features,
        user_features: features(&["age_group"], FeatureKind::Categorical),
        context_features,
        counters: counters(&keys, &["click", "like"]),
    }
}

#[cfg(test)]
mod tests;
