//! The schema: which surfaces, actions, tasks and features a data set has.
//!
//! `schema.toml` is written by `import` and read by everything after it. It
//! says what the columns mean, not how a model uses them.

mod validate;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{CommonErrors as _, Error, Result};

/// Numeric columns that every data set has, computed by `features`: log(1 + the user's events so
/// far), log(1 + seconds since the user's last event), log(1 + hours since the item's first impression).
/// Each is 0 where there is nothing to look back to.
pub const BUILT_IN_FEATURES: [&str; 3] =
    ["user_history_len", "seconds_since_last_event", "item_age"];

/// Categorical columns that every data set has: the raw ids, the surface's index, the hour of the
/// day (UTC).
pub const BUILT_IN_IDS: [&str; 4] = ["user_id", "item_id", "surface", "hour"];

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
/// It gives the numeric columns `NAME_rate`, the smoothed logit of the rate, `NAME_count`,
/// log(1 + impressions), and, if it never forgets, `NAME_effect`: what its key adds to the action's log odds
/// when all such counters of the action and the surface explain outcomes together. The sums of an action's
/// effects are columns too: `ACTION_log_odds`, and `ACTION_doubt`, their standard deviation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// The counter's name.
    pub name: String,
    /// Its key: id columns (`user_id`, `item_id`, `surface`, any categorical feature), joined.
    pub key: Vec<String>,
    /// The action it counts.
    pub action: String,
    /// After how many days an impression counts half; 0 never forgets.
    #[serde(default)]
    pub half_life_days: f32,
}

impl Counter {
    /// Whether it never forgets.
    pub fn is_lasting(&self) -> bool {
        self.half_life_days == 0.0
    }

    /// What its numeric columns end in, in their order.
    pub fn columns(&self) -> &'static [&'static str] {
        if self.is_lasting() { &["rate", "count", "effect"] } else { &["rate", "count"] }
    }
}

impl Schema {
    /// Reads and validates a `schema.toml`.
    pub fn load(path: &Path) -> Result<Schema> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        let schema: Schema =
            toml::from_str(&text).map_err(|error| Error::data(path, error.to_string()))?;
        schema.validate().map_err(|error| Error::data(path, error.to_string()))?;
        Ok(schema)
    }

    /// Validates and writes a `schema.toml`.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.validate()?;
        let text = toml::to_string(self).map_err(|error| Error::data(path, error.to_string()))?;
        fs::write(path, text).map_err(Error::io(path))
    }

    /// The names of `Target::ids`: the built-in ids, then the categorical item, user and context features.
    pub fn id_columns(&self) -> Vec<String> {
        let built_in = BUILT_IN_IDS.iter().map(|name| name.to_string());
        built_in.chain(self.features_of(FeatureKind::Categorical)).collect()
    }

    /// The names of `Target::features`: the dense item, user and context features, the columns of each
    /// counter, those of the actions that have effects, then the built-in features.
    pub fn feature_columns(&self) -> Vec<String> {
        let counters = self.counters.iter().flat_map(|counter| {
            counter.columns().iter().map(|kind| format!("{}_{kind}", counter.name))
        });
        let beliefs = self.believed_actions().flat_map(|action| {
            ["log_odds", "doubt"].map(|kind| format!("{}_{kind}", self.actions[action]))
        });
        let built_in = BUILT_IN_FEATURES.iter().map(|name| name.to_string());
        self.features_of(FeatureKind::Dense)
            .chain(counters)
            .chain(beliefs)
            .chain(built_in)
            .collect()
    }

    /// The actions that have effects: those of lasting counters.
    pub fn believed_actions(&self) -> impl Iterator<Item = usize> {
        let lasting = |name: &String| {
            self.counters.iter().any(|counter| counter.is_lasting() && counter.action == *name)
        };
        self.actions
            .iter()
            .enumerate()
            .filter(move |(_, name)| lasting(name))
            .map(|(index, _)| index)
    }

    /// The index of an action by name.
    pub fn action(&self, name: &str) -> Option<usize> {
        self.actions.iter().position(|action| action == name)
    }

    /// The index of a surface by name.
    pub fn surface(&self, name: &str) -> Option<u16> {
        self.surfaces.iter().position(|surface| surface == name).map(|index| index as u16)
    }

    /// The index of a value by name.
    pub fn value(&self, name: &str) -> Option<usize> {
        self.values.iter().position(|value| value == name)
    }

    /// The index of a task by name.
    pub fn task(&self, name: &str) -> Option<usize> {
        self.tasks.iter().position(|task| task.name == name)
    }

    /// Whether task `task` is valid on surface `surface` (both are indices).
    pub fn task_valid(&self, task: usize, surface: u16) -> bool {
        let valid = &self.tasks[task].surfaces;
        valid.is_empty() || valid.contains(&self.surfaces[surface as usize])
    }

    fn features_of(&self, kind: FeatureKind) -> impl Iterator<Item = String> {
        let all = [&self.item_features, &self.user_features, &self.context_features]
            .into_iter()
            .flatten();
        all.filter(move |feature| feature.kind == kind).map(|feature| feature.name.clone())
    }
}

/// The names of the features of one kind, in order.
pub fn names(features: &[Feature], kind: FeatureKind) -> Vec<&str> {
    features
        .iter()
        .filter(|feature| feature.kind == kind)
        .map(|feature| feature.name.as_str())
        .collect()
}

/// A category's id: 0 for an empty cell, a positive decimal number for itself, any other text by
/// its 63-bit FNV-1a hash, so that importers and callers agree without a dictionary.
pub fn category_id(text: &str) -> u64 {
    let text = text.trim();
    if text.is_empty() {
        return 0;
    }
    match text.parse::<u64>() {
        Ok(number) if number != 0 && number <= i64::MAX as u64 => number,
        _ => {
            let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
                (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
            });
            (hash & i64::MAX as u64).max(1)
        }
    }
}

fn one() -> f32 {
    1.0
}
