//! A mapping: which columns of a team's files are what, in `mapping.toml`.
//!
//! It renames, compares with thresholds, maps values, clips and fills in defaults. It has no
//! expressions: what is to be computed is computed where the files are made. Tasks and counters
//! stand in it as in `schema.toml`.

mod derived;
mod entities;
mod import;
mod impressions;
mod schema;
mod source;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use hypercast_data::schema::{Counter, EntityIds, FeatureKind, Task};
use serde::Deserialize;

pub(crate) use self::derived::DerivedColumn;
pub use self::import::import;
pub(crate) use self::import::{ImpressionSink, PresetImport};
use crate::cell::TimeUnit;
use crate::error::{CommonErrors as _, Error, Result};
use crate::input::InputOptions;

/// The content of `mapping.toml`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mapping {
    /// The names of surfaces, in the order of their numbers.
    pub surfaces: Vec<String>,
    /// Whether ids are whole numbers or texts.
    #[serde(default)]
    pub ids: EntityIds,
    /// What was shown to whom, where and when.
    pub impressions: ImpressionMapping,
    /// What users did with it.
    pub actions: Vec<ActionMapping>,
    /// Numbers that came of it.
    #[serde(default)]
    pub values: Vec<ValueMapping>,
    /// Features of an item in its request; a request to the daemon sends them.
    #[serde(default)]
    pub context_features: Vec<FeatureMapping>,
    /// The items with their features; without it, they are what impressions name.
    pub items: Option<EntityMapping>,
    /// The users with their features.
    pub users: Option<EntityMapping>,
    /// The targets that models predict.
    pub tasks: Vec<Task>,
    /// Running counters over past outcomes.
    #[serde(default)]
    pub counters: Vec<Counter>,
    /// The folder that relative names of files count from: that of the mapping.
    #[serde(skip)]
    pub folder: PathBuf,
}

/// The files of impressions, and the columns that are not outcomes or features.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImpressionMapping {
    /// Their names, with `*` for any part of a name and `**` for folders.
    pub files: Vec<String>,
    /// What the names do not say.
    #[serde(default)]
    pub options: InputOptions,
    /// The column of the user's id.
    pub user: String,
    /// The column of the item's id.
    pub item: String,
    /// The column of the surface; optional if there is one surface.
    pub surface: Option<String>,
    /// Surfaces by what the column says, where that is not their name.
    #[serde(default)]
    pub surface_map: BTreeMap<String, String>,
    /// The surface where the column is empty or says something else. Without it, such rows are
    /// left out.
    pub surface_default: Option<String>,
    /// The column of the time when the item was shown.
    pub time: String,
    /// How it is written.
    pub time_unit: TimeUnit,
    /// The column that the rows of a request share.
    pub request: Option<String>,
    /// Rows of one user and surface within this time of the first are a request. Beside `request`,
    /// it bounds how long an id means the same request, and holds for rows without one.
    pub request_within_s: Option<f64>,
    /// The most rows of a request; those behind them are another one.
    pub request_rows: Option<usize>,
    /// The column of the time when the outcome was known.
    pub outcome_time: Option<String>,
    /// How it is written; as `time`, by default.
    pub outcome_unit: Option<TimeUnit>,
    /// The time from an impression until its outcome is known; beside `outcome_time`, for rows
    /// without one.
    pub outcome_delay_s: Option<f64>,
}

/// An action, and the column that says whether it happened.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionMapping {
    /// Its name in the schema.
    pub name: String,
    /// The column; by default it is called as the action.
    pub column: Option<String>,
    /// The least number with which the action happened. Without it, `at_most` and `one_of`, the
    /// column has to say yes or no.
    pub at_least: Option<f64>,
    /// The greatest number with which it happened.
    pub at_most: Option<f64>,
    /// The texts with which the action happened; with any other it did not.
    #[serde(default)]
    pub one_of: Vec<String>,
    /// What a missing cell means; without it, that nobody knows.
    pub default: Option<bool>,
}

/// A number that an impression led to, and its column.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueMapping {
    /// Its name in the schema.
    pub name: String,
    /// The column; by default it is called as the value.
    pub column: Option<String>,
    /// The number of a missing cell; without it, that nobody knows.
    pub default: Option<f64>,
    /// The least and the greatest number. What is beyond becomes the nearest of them, here and
    /// where the daemon takes it in.
    pub clip: Option<[f32; 2]>,
}

/// A feature and its column.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureMapping {
    /// Its name in the schema.
    pub name: String,
    /// Categorical or dense.
    pub kind: FeatureKind,
    /// The column; by default it is called as the feature.
    pub column: Option<String>,
    /// Categories by what the column says, where they shall be called otherwise.
    #[serde(default)]
    pub map: BTreeMap<String, String>,
    /// The category or number of a missing cell; without it, it stays missing.
    pub default: Option<FeatureDefault>,
    /// Whether models learn from its absence, and requests and events may leave it out (see
    /// `schema::Feature`).
    #[serde(default)]
    pub optional: bool,
    /// Whether only training knows it, and no request sends it; of the context alone.
    #[serde(default)]
    pub training_only: bool,
    /// The least and the greatest number of a dense feature, as of a value.
    pub clip: Option<[f32; 2]>,
    /// Whether a dense feature is log(1 + n) of the column's number n, or 0 if that is below 0.
    #[serde(default)]
    pub log: bool,
    /// What is taken of a list.
    pub list: Option<ListChoice>,
    /// The most values that a category has at once, which are taken of a list (see
    /// `schema::Feature`).
    pub max_values: Option<usize>,
    /// The character between two elements of a list that stands in a text.
    pub separator: Option<char>,
}

/// What a feature is where its cell is missing.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum FeatureDefault {
    /// The number of a dense feature, or the category of that number.
    Number(f64),
    /// The category of this text.
    Text(String),
}

/// What a feature takes of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ListChoice {
    /// Its first element.
    First,
}

/// The files of items or users, and their columns.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntityMapping {
    /// Their names, as of the impressions.
    pub files: Vec<String>,
    /// What the names do not say.
    #[serde(default)]
    pub options: InputOptions,
    /// The column of the id.
    pub id: String,
    /// The column of a name for people; items alone have one.
    pub name: Option<String>,
    /// Whether impressions of others are left out. Without it, they count, and have no features.
    #[serde(default)]
    pub required: bool,
    /// The features, the same in every request.
    #[serde(default)]
    pub features: Vec<FeatureMapping>,
}

impl ActionMapping {
    /// The numbers with which the action happened, if numbers say so.
    fn range(&self) -> Option<[f64; 2]> {
        let is_number = self.at_least.is_some() || self.at_most.is_some();
        let (least, most) = (self.at_least.unwrap_or(f64::MIN), self.at_most.unwrap_or(f64::MAX));
        is_number.then_some([least, most])
    }
}

impl Mapping {
    /// Reads and validates a `mapping.toml`.
    ///
    /// # Errors
    /// The file cannot be read, or the mapping contradicts itself; the error names the entry.
    pub fn load(path: &Path) -> Result<Mapping> {
        let text = fs::read_to_string(path).map_err(Error::io(path))?;
        Mapping::parse(&text, path)
    }

    /// A mapping whose file is `path`, from its text.
    ///
    /// # Errors
    /// As those of [`Mapping::load`].
    pub(crate) fn parse(text: &str, path: &Path) -> Result<Mapping> {
        let mut mapping: Mapping =
            toml::from_str(text).map_err(|error| Error::data(path, error.to_string()))?;
        mapping.folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
        mapping.schema().map_err(|error| Error::data(path, error.to_string()))?;
        Ok(mapping)
    }
}

#[cfg(test)]
pub(crate) mod tests;
