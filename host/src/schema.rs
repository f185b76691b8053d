//! The schema: which surfaces, actions, tasks and features a data set has.
//!
//! `schema.toml` is written by `import` and read by everything after it. It
//! says what the columns mean, not how a model uses them.

use serde::{Deserialize, Serialize};

/// A data set's schema.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// Surfaces by name; events carry the index.
    pub surfaces: Vec<String>,
    /// Actions by name, at most 32; events carry a bit each.
    pub actions: Vec<String>,
    /// Real-valued outcomes by name, at most `MAX_VALUES`.
    #[serde(default)]
    pub values: Vec<String>,
    /// What the models predict.
    pub tasks: Vec<Task>,
    /// Features of an item.
    #[serde(default)]
    pub item_features: Vec<Feature>,
    /// Features of a user.
    #[serde(default)]
    pub user_features: Vec<Feature>,
    /// Features of a candidate in its request (sent by the caller or computed from the time).
    #[serde(default)]
    pub context_features: Vec<Feature>,
    /// Running counters over past outcomes, kept by the host.
    #[serde(default)]
    pub counters: Vec<Counter>,
}

/// A prediction target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// The task's name.
    pub name: String,
    /// Main (shared by all surfaces) or auxiliary (a surface's own).
    pub role: TaskRole,
    /// Binary or regression.
    pub kind: TaskKind,
    /// The action (binary) or value (regression) that is its label.
    pub label: String,
    /// The surfaces where it is valid; empty means all.
    #[serde(default)]
    pub surfaces: Vec<String>,
    /// ω in the paper's eq. 3.
    #[serde(default = "one")]
    pub weight: f32,
}

/// Main or auxiliary (section 3.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskRole {
    /// Shared across surfaces.
    Main,
    /// One surface's own.
    Auxiliary,
}

/// What a task's label is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    /// 0 or 1.
    Binary,
    /// A real number.
    Regression,
}

/// A named feature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Feature {
    /// The feature's name.
    pub name: String,
    /// How it is read.
    pub kind: FeatureKind,
}

/// How a feature is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureKind {
    /// A 64-bit id without order.
    Categorical,
    /// A number.
    Dense,
}

/// A running counter: how often an action followed an impression, for one key.
///
/// It gives two numeric columns: `NAME_rate`, the smoothed logit of the rate,
/// and `NAME_count`, log(1 + impressions).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// The counter's name.
    pub name: String,
    /// Its key: id columns (`user_id`, `item_id`, `surface`, any categorical feature), joined.
    pub key: Vec<String>,
    /// The action it counts.
    pub action: String,
}

fn one() -> f32 {
    1.0
}
