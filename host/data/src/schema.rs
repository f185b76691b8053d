//! The schema: the surfaces, actions, tasks and features of a data set.
//!
//! `import` writes `schema.toml`, and everything else reads it. It defines the meaning of columns,
//! not how a model uses them.

mod alignment;
mod build;
mod fm_spec;
pub mod growth;
mod main_tasks;
mod missing;
mod owned;
mod ranges;
mod tags;
mod training_only;
mod upgrade;
mod user_activity;
mod validate;
mod watch;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use hypercast_core::{atomic_file, disk};
use hypercast_fm::example::{Example, Item, Outcome};
pub use hypercast_fm::example::{MAX_ACTIONS, MAX_VALUES};
pub use hypercast_fm::label_scale::LabelTransform;
use serde::{Deserialize, Serialize};

pub use self::alignment::{SurfaceAlignment, trainer_growths, trainer_spec};
pub use self::fm_spec::{example_spec, fm_spec, spec_growths};
use self::growth::{EntryKind, SchemaSize};
pub use self::main_tasks::MainTasks;
pub use self::missing::{MISSING, MissingColumns};
pub use self::owned::{CoreColumns, OwnColumns, OwnedEntries};
pub use self::ranges::{BeyondRange, ColumnRanges, ValueRange};
pub use self::tags::{IdField, MAX_TAGS, fill_tags};
pub use self::training_only::is_position_name;
pub(crate) use self::upgrade::ColumnDefaults;
pub use self::upgrade::ColumnUpgrade;
pub use self::watch::SchemaWatch;
use crate::error::{CommonErrors as _, Error, Result};

/// Numeric columns that every data set has, computed by `features`: log(1 + the user's events so
/// far), log(1 + seconds since the user's last event), log(1 + hours since the item's first
/// impression). Each is 0 before the first event.
pub const BUILT_IN_FEATURES: [&str; 3] =
    ["user_history_len", "seconds_since_last_event", "item_age"];

/// Categorical columns that every data set has: the raw ids, the surface's index, and the hour of
/// the day (UTC).
pub const BUILT_IN_IDS: [&str; 4] = ["user_id", "item_id", "surface", "hour"];

/// The meaning of a data set's columns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schema {
    /// Names of surfaces; events refer to them by index.
    pub surfaces: Vec<String>,
    /// Names of actions, at most [`MAX_ACTIONS`]; an outcome has one bit for each.
    pub actions: Vec<String>,
    /// Names of real-valued outcomes, at most [`MAX_VALUES`].
    #[serde(default)]
    pub values: Vec<String>,
    /// The targets that models predict.
    pub tasks: Vec<Task>,
    /// Features of an item, the same in every request.
    #[serde(default)]
    pub item_features: Vec<Feature>,
    /// Features of a user, the same in every request.
    #[serde(default)]
    pub user_features: Vec<Feature>,
    /// Features of a candidate in its request, which the caller sends.
    #[serde(default)]
    pub context_features: Vec<Feature>,
    /// Running counters over past outcomes, which the host maintains.
    #[serde(default)]
    pub counters: Vec<Counter>,
    /// Bounds of values and dense features; those without one are bounded only by being finite.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ranges: Vec<ValueRange>,
    /// What ids are where the data comes from.
    #[serde(default, skip_serializing_if = "EntityIds::are_integers")]
    pub ids: EntityIds,
    /// Features that are no longer used. They keep their names and columns, which hold "missing"
    /// from now on; callers and files need not have them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub retired: Vec<String>,
    /// By surface: the entries of the lists above that belong to it. The foundation model and the
    /// experts of other surfaces are not told of them (see [`CoreColumns`]).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub owned: BTreeMap<String, OwnedEntries>,
    /// By surface: the alignment module that its team declares for the training of the FM. Other
    /// surfaces have the usual one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub alignment: BTreeMap<String, SurfaceAlignment>,
    /// The sizes of the schema before each time that it grew, oldest first, by which everything
    /// that was stored before is read. `hypercast schema apply` writes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub earlier: Vec<SchemaSize>,
}

/// What the ids of users and items are where the data comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EntityIds {
    /// The ids of users.
    pub users: IdKind,
    /// The ids of items.
    pub items: IdKind,
}

impl EntityIds {
    fn are_integers(&self) -> bool {
        *self == EntityIds::default()
    }
}

/// The form of an entity's ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IdKind {
    /// Whole numbers of 64 bits, from 0 on.
    #[default]
    Integer,
    /// Texts; the data set has their keys, and a dictionary (see `dataset::ids`).
    String,
}

/// A target that models predict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Task {
    /// Unique among the tasks.
    pub name: String,
    /// Main (shared by all surfaces) or auxiliary (for one surface).
    pub role: TaskRole,
    /// Binary or regression.
    pub kind: TaskKind,
    /// The action (binary) or value (regression) that is its label.
    pub label: String,
    /// What models learn of a regression's label: `log` for amounts with a long tail. Predictions
    /// are in the label's unit all the same.
    #[serde(default, skip_serializing_if = "LabelTransform::is_identity")]
    pub transform: LabelTransform,
    /// The surfaces on which it is valid; empty means all.
    #[serde(default)]
    pub surfaces: Vec<String>,
    /// Its weight in the loss, ω in the paper's eq. 3.
    #[serde(default = "one")]
    pub weight: f32,
}

/// The role of a task in training (paper section 3.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskRole {
    /// All surfaces share it.
    Main,
    /// It belongs to one surface.
    Auxiliary,
}

/// The type of a task's label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TaskKind {
    /// 0 or 1.
    Binary,
    /// A real number.
    Regression,
}

/// A feature of items, users or contexts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Feature {
    /// Unique among all columns.
    pub name: String,
    /// Categorical or dense.
    pub kind: FeatureKind,
    /// Whether it may be missing where it is sent, and whether models learn from that: a dense
    /// feature then has a second column, `NAME_missing` (see [`Schema::feature_columns`]).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub optional: bool,
    /// The most values that a categorical feature has at once, as tags and genres do: 2 to
    /// [`MAX_TAGS`]. Without it, a feature has one value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_values: Option<usize>,
    /// Whether only training knows it, as the position at which an item was shown: files and events
    /// have it, and requests need not send it. Then it is optional, too. Context features alone
    /// can be so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub training_only: bool,
}

/// The type of a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeatureKind {
    /// A 64-bit id without order; 0 means "missing".
    Categorical,
    /// A 32-bit float.
    Dense,
}

/// A running counter: how often an action followed an impression, for each value of a key.
///
/// It adds the numeric columns `NAME_rate` (the smoothed logit of the rate) and `NAME_count` (the
/// log of 1 plus impressions). A counter of the core that never forgets also adds `NAME_effect`:
/// the log odds that its key contributes to the action when all such counters and the surface
/// explain outcomes together. The sum of an action's effects and its standard deviation are the
/// columns `ACTION_log_odds` and `ACTION_doubt`. A counter that belongs to a surface has no effect,
/// which would change those of the core's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counter {
    /// Unique among the counters; its columns begin with it.
    pub name: String,
    /// The id columns that form its key: `user_id`, `item_id`, `surface`, `hour` or any categorical
    /// feature.
    pub key: Vec<String>,
    /// The action that it counts.
    pub action: String,
    /// The number of days after which an impression counts half; 0 never forgets.
    #[serde(default)]
    pub half_life_days: f32,
}

impl Counter {
    /// Whether it never forgets.
    pub fn is_lasting(&self) -> bool {
        self.half_life_days == 0.0
    }
}

impl Schema {
    /// Reads and validates a `schema.toml`.
    ///
    /// # Errors
    /// The file cannot be read, or [`Self::validate`] refuses it.
    pub fn load(path: &Path) -> Result<Schema> {
        let text = disk::read_to_string(path).map_err(Error::io(path))?;
        let schema: Schema =
            toml::from_str(&text).map_err(|error| Error::data(path, error.to_string()))?;
        schema.validate().map_err(|error| Error::data(path, error.to_string()))?;
        Ok(schema)
    }

    /// Validates and writes a `schema.toml`.
    ///
    /// # Errors
    /// [`Self::validate`] refuses it, or the file system fails.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.validate()?;
        let text = toml::to_string(self).map_err(|error| Error::data(path, error.to_string()))?;
        atomic_file::write(path, text.as_bytes()).map_err(Error::io(path))
    }

    /// The schema without what may change at any time, which is ranges, retirements, alignment
    /// modules and the record of its growth: what decides whether models, logs and states of two
    /// schemas fit each other.
    pub fn layout(&self) -> Schema {
        let (ranges, retired, earlier) = (Vec::new(), Vec::new(), Vec::new());
        Schema { ranges, retired, earlier, alignment: BTreeMap::new(), ..self.clone() }
    }

    /// Whether a feature is no longer used.
    pub fn is_retired(&self, feature: &str) -> bool {
        self.retired.iter().any(|name| name == feature)
    }

    /// The names of `Target::ids`: the built-in ids, then the columns of the categorical features
    /// of items, users and contexts. A feature of several values has one for each (see [`tags`]).
    pub fn id_columns(&self) -> Vec<String> {
        let built_in = BUILT_IN_IDS.iter().map(|name| name.to_string());
        built_in.chain(self.features_of(FeatureKind::Categorical)).collect()
    }

    /// The names of `Target::features`: the dense features of items, users and contexts, the
    /// columns of each counter, those of the actions with effects, the built-in features, and
    /// `NAME_missing` of each dense feature that is optional: 1 where it is missing, else 0.
    pub fn feature_columns(&self) -> Vec<String> {
        let counters = self.counters.iter().flat_map(|counter| {
            self.counter_columns(counter).iter().map(|kind| format!("{}_{kind}", counter.name))
        });
        let effects = self.effect_actions().flat_map(|action| {
            ["log_odds", "doubt"].map(|kind| format!("{}_{kind}", self.actions[action]))
        });
        let built_in = BUILT_IN_FEATURES.iter().map(|name| name.to_string());
        let dense: Vec<String> = self.features_of(FeatureKind::Dense).collect();
        let optional = MissingColumns::new(self);
        let missing = optional.optional().iter().map(|&at| format!("{}_missing", dense[at]));
        let missing: Vec<String> = missing.collect();
        dense.into_iter().chain(counters).chain(effects).chain(built_in).chain(missing).collect()
    }

    /// All features, in the order of their columns: those of items, of users and of contexts.
    pub fn features(&self) -> impl Iterator<Item = &Feature> {
        self.item_features.iter().chain(&self.user_features).chain(&self.context_features)
    }

    /// Whether a counter has an effect.
    pub fn has_effect(&self, counter: &Counter) -> bool {
        counter.is_lasting() && self.owner(EntryKind::Counter, &counter.name).is_none()
    }

    /// The endings of a counter's numeric columns, in their order.
    pub fn counter_columns(&self, counter: &Counter) -> &'static [&'static str] {
        if self.has_effect(counter) { &["rate", "count", "effect"] } else { &["rate", "count"] }
    }

    /// The actions that have effects, by index: those of the counters that have one.
    pub fn effect_actions(&self) -> impl Iterator<Item = usize> {
        (0..self.actions.len()).filter(|&action| {
            let mut counters = self.counters.iter().filter(|counter| self.has_effect(counter));
            counters.any(|counter| counter.action == self.actions[action])
        })
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

    /// The main tasks, which an FM predicts for every surface, in the order of its predictions.
    pub fn main_tasks(&self) -> impl Iterator<Item = &Task> {
        self.tasks.iter().filter(|task| task.role == TaskRole::Main)
    }

    /// The index of a task by name.
    pub fn task(&self, name: &str) -> Option<usize> {
        self.tasks.iter().position(|task| task.name == name)
    }

    /// The label of a task for an impression on a surface; none if it is not known or outside the
    /// task's sample space, as it is where the schema has no such task or surface.
    pub fn label(&self, task: usize, surface: u16, outcome: &Outcome) -> Option<f32> {
        let Task { kind, label, .. } = self.tasks.get(task)?;
        let label = match kind {
            TaskKind::Binary => {
                let action = self.action(label).filter(|action| outcome.known >> action & 1 == 1);
                action.map(|action| (outcome.actions >> action & 1) as f32)
            }
            TaskKind::Regression => self.value(label).map(|value| outcome.values[value]),
        };
        label.filter(|label| !label.is_nan() && self.task_valid(task, surface))
    }

    /// Whether a task is valid on a surface, both by index: none is on a surface that the schema
    /// does not have.
    pub fn task_valid(&self, task: usize, surface: u16) -> bool {
        let known = self.tasks.get(task).zip(self.surfaces.get(usize::from(surface)));
        known.is_some_and(|(task, surface)| task.is_valid_on(surface))
    }

    /// An item of which no feature is known.
    pub fn blank_item(&self, id: u64) -> Item {
        let FeatureCounts { ids, dense } = FeatureCounts::of(&self.item_features);
        Item { id, ids: vec![0; ids], dense: vec![MISSING; dense], ..Item::default() }
    }

    fn features_of(&self, kind: FeatureKind) -> impl Iterator<Item = String> {
        let of_kind = self.features().filter(move |feature| feature.kind == kind);
        of_kind.flat_map(Feature::columns)
    }
}

/// The columns of the features of one type, in order.
pub fn columns_of(features: &[Feature], kind: FeatureKind) -> Vec<String> {
    features.iter().filter(|feature| feature.kind == kind).flat_map(Feature::columns).collect()
}

/// The numbers of columns of categorical and dense features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FeatureCounts {
    pub(crate) ids: usize,
    pub(crate) dense: usize,
}

impl FeatureCounts {
    pub(crate) fn of(features: &[Feature]) -> FeatureCounts {
        let count = |kind| columns_of(features, kind).len();
        FeatureCounts { ids: count(FeatureKind::Categorical), dense: count(FeatureKind::Dense) }
    }
}

/// The numbers of all features.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FeatureWidths {
    pub(crate) item: FeatureCounts,
    pub(crate) user: FeatureCounts,
    pub(crate) context: FeatureCounts,
}

impl FeatureWidths {
    pub(crate) fn new(schema: &Schema) -> FeatureWidths {
        FeatureWidths {
            item: FeatureCounts::of(&schema.item_features),
            user: FeatureCounts::of(&schema.user_features),
            context: FeatureCounts::of(&schema.context_features),
        }
    }

    /// The number of dense features, which come before the counters' columns.
    pub(crate) fn dense(&self) -> usize {
        self.item.dense + self.user.dense + self.context.dense
    }
}

/// Reads the labels of a schema's binary tasks from outcomes.
#[derive(Debug, Clone)]
pub struct BinaryLabels {
    /// The schema that the indices of tasks refer to.
    pub schema: Arc<Schema>,
}

impl BinaryLabels {
    /// The labels of `schema`'s binary tasks.
    pub fn new(schema: &Arc<Schema>) -> Self {
        Self { schema: schema.clone() }
    }

    /// The binary tasks, by index.
    pub fn tasks(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.schema.tasks.len()).filter(|&task| self.is_binary(task))
    }

    /// The label of an example's target `row`; none if it is not known or outside the task's sample
    /// space.
    pub fn label(&self, example: &Example, row: usize, task: usize) -> Option<bool> {
        self.of_outcome(&example.targets[row].outcome, example.surface, task)
    }

    /// The label of an outcome on a surface; none as for [`BinaryLabels::label`].
    pub fn of_outcome(&self, outcome: &Outcome, surface: u16, task: usize) -> Option<bool> {
        let label = self.schema.label(task, surface, outcome);
        label.filter(|_| self.is_binary(task)).map(|label| label == 1.0)
    }

    fn is_binary(&self, task: usize) -> bool {
        self.schema.tasks[task].kind == TaskKind::Binary
    }
}

/// Texts that stand for a missing cell. `NA` is not one of them, because it is also a country.
const MISSING_TEXTS: [&str; 10] =
    ["", "nan", "NaN", "null", "NULL", "\\N", "N/A", "n/a", "#N/A", "None"];

/// The length of the longest of them.
const LONGEST_MISSING: usize = 4;

/// Whether a text stands for a missing cell, in files as where callers send it.
pub fn is_missing_text(text: &str) -> bool {
    let content = text.trim();
    content.len() <= LONGEST_MISSING && MISSING_TEXTS.contains(&content)
}

/// A category's id: 0 for an empty cell, a positive decimal number for itself, and the 63-bit
/// FNV-1a hash of any other text. So importers and callers agree without a dictionary.
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
