//! An imported data set: a directory that any data tool can read.
//!
//! It contains `schema.toml`, `items.parquet`, `users.parquet`, `impressions.parquet` and, if there
//! are content vectors, `content.parquet`; if ids are texts, `user-ids.parquet` and
//! `item-ids.parquet`. Impressions are sorted by `time_ms`, and those of one
//! request are adjacent. `import` writes the directory. [`timeline`] decides what was known when.

pub mod content;
mod entities;
pub mod entity_id;
pub mod id_dictionary;
pub mod ids;
mod impressions;
pub mod table;
pub mod timeline;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypercast_core::{atomic_dir, disk};
use hypercast_fm::example::{Item, Outcome, User};
use serde::{Deserialize, Serialize};

pub use impressions::{ImpressionReader, ImpressionWriter};

use crate::error::{CommonErrors as _, Error, Result};
use crate::schema::Schema;

/// One item shown to one user, and the outcome: a row of `impressions.parquet`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Impression {
    /// The id of the request, which items shown together share.
    pub request: u64,
    /// The time of the request, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The time when the outcome became known, in milliseconds since the epoch.
    pub outcome_ms: i64,
    /// The user's raw id.
    pub user: u64,
    /// The item's raw id.
    pub item: u64,
    /// An index into `schema.surfaces`.
    pub surface: u16,
    /// The actions and values that are known.
    pub outcome: Outcome,
    /// Features of the item in this request.
    pub context: ContextFeatures,
    /// The true probability (or expected value) of each task in a simulated world, else empty.
    pub truth: Vec<f32>,
    /// A past event without an exact time or surface: part of histories, never of a request.
    pub history_only: bool,
}

/// The context features of an impression or a candidate, in the schema's order.
/// In an empty list all are missing, which is 0 of a category and [`crate::schema::MISSING`] of a
/// number.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct ContextFeatures {
    /// Categorical features.
    pub ids: Vec<u64>,
    /// Dense features.
    pub dense: Vec<f32>,
}

/// An imported data set, its items and users in memory, its impressions on disk.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Its directory.
    pub dir: PathBuf,
    /// The meaning of its columns.
    pub schema: Arc<Schema>,
    /// Items by raw id.
    pub items: HashMap<u64, Arc<Item>>,
    /// Names of items for people, by raw id; empty if the data has none.
    pub item_names: HashMap<u64, String>,
    /// Users by raw id.
    pub users: HashMap<u64, Arc<User>>,
    /// The number of impressions.
    pub rows: usize,
    /// The length of the items' content vectors; 0 without any.
    pub content: usize,
}

impl Dataset {
    /// Opens the directory that an import wrote.
    pub fn open(dir: &Path) -> Result<Dataset> {
        let schema_path = dir.join("schema.toml");
        if !disk::is_file(&schema_path) {
            let reason = "no data set here: `schema.toml` is missing; make one with \
                          `hypercast data import`, `hypercast import` or `hypercast simulate`";
            return Err(Error::data(dir, reason));
        }
        let schema = Arc::new(Schema::load(&schema_path)?);
        let (mut items, item_names) = entities::read_items(&dir.join("items.parquet"), &schema)?;
        let users = entities::read_users(&dir.join("users.parquet"), &schema)?;
        let content = content::attach(dir, &mut items)?;
        let rows = ImpressionReader::open(dir, &schema)?.rows();
        Ok(Dataset { dir: dir.to_path_buf(), schema, items, item_names, users, rows, content })
    }

    /// The same data set without content vectors, which joined examples do not carry.
    pub fn without_content(&self) -> Dataset {
        let bare = |item: &Arc<Item>| {
            if item.content.is_empty() {
                item.clone()
            } else {
                Arc::new(Item { content: Arc::default(), ..(**item).clone() })
            }
        };
        let items = self.items.iter().map(|(&id, item)| (id, bare(item))).collect();
        Dataset { items, content: 0, ..self.clone() }
    }

    /// All impressions in time order, streamed from disk. A row that is out of order is an error.
    pub fn impressions(&self) -> Result<ImpressionReader> {
        ImpressionReader::open(&self.dir, &self.schema)
    }

    /// The number of requests before `until_ms` by users that `counts` accepts. History-only events
    /// are not requests.
    ///
    /// # Errors
    /// The impressions cannot be read.
    pub fn requests(&self, until_ms: Option<i64>, counts: impl Fn(u64) -> bool) -> Result<u64> {
        let (mut count, mut last) = (0, None);
        for impression in self.impressions()? {
            let impression = impression?;
            if until_ms.is_some_and(|until_ms| impression.time_ms >= until_ms) {
                break;
            }
            let request = Some(impression.request);
            if !impression.history_only && last != request && counts(impression.user) {
                count += 1;
                last = request;
            }
        }
        Ok(count)
    }
}

/// Everything that an import writes except the impressions.
#[derive(Debug)]
pub struct Entities<'a> {
    /// The meaning of the columns.
    pub schema: &'a Schema,
    /// All items, each id once.
    pub items: &'a [Item],
    /// The items' names, in the same order; empty if the data has none.
    pub item_names: &'a [String],
    /// All users, each id once.
    pub users: &'a [User],
}

/// Writes the schema, the items and the users.
pub fn write_entities(dir: &Path, entities: &Entities<'_>) -> Result<()> {
    atomic_dir::create(dir)?;
    entities.schema.save(&dir.join("schema.toml"))?;
    entities::write_items(&dir.join("items.parquet"), entities)?;
    entities::write_users(&dir.join("users.parquet"), entities)
}

/// Writes a whole data set. Sorts the impressions by time and request, with a stable sort; each
/// file gets its name when it is complete.
pub fn write_dataset(
    dir: &Path,
    entities: &Entities<'_>,
    impressions: &mut [Impression],
) -> Result<()> {
    write_entities(dir, entities)?;
    impressions.sort_by_key(|impression| (impression.time_ms, impression.request));
    let mut writer = ImpressionWriter::create(dir, entities.schema);
    for impression in impressions.iter() {
        writer.write(impression)?;
    }
    writer.finish()
}
