//! The host's bindings of `sdk/wit/expert.wit`, generated from that file, which documents them.
//!
//! Added are the versions of the contract, and the host's schema and examples as plugins see them.
//! Descriptions and columns are those of the host, after they were read.
#![allow(missing_docs, reason = "generated from expert.wit, which documents it")]

use hypercast_core::hash::mix64;
use hypercast_data::schema::{IdField, Schema, TaskKind as SchemaTaskKind};
use hypercast_fm::example::Example;

pub use super::column::DeclaredColumn as Column;
pub use super::description::ExpertDescription as Description;

mod wire {
    wasmtime::component::bindgen!({ path: "wit", world: "expert" });
}

pub use self::wire::hypercast::expert::types::*;
pub use self::wire::hypercast::expert::types::{
    Column as WireColumn, Description as WireDescription,
};
pub use self::wire::{Expert, ExpertImports, ExpertPre};

/// The version of the contract that this host implements.
pub const VERSION: &str = "3.0.0";

/// The version of the contract of before, which this host speaks, too.
pub const EARLIER_VERSION: &str = "2.0.0";

/// The component import whose suffix is the contract's version.
pub const TYPES_IMPORT: &str = "hypercast:expert/types@";

/// A version of the contract that this host speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Contract {
    /// [`EARLIER_VERSION`].
    Second,
    /// [`VERSION`].
    Third,
}

impl Contract {
    /// The one of a component that imports the types of `version`; none if the host does not speak
    /// it.
    pub fn of(version: &str) -> Option<Contract> {
        match major(version)? {
            2 => Some(Contract::Second),
            3 => Some(Contract::Third),
            _ => None,
        }
    }

    pub fn version(self) -> &'static str {
        match self {
            Contract::Second => EARLIER_VERSION,
            Contract::Third => VERSION,
        }
    }
}

/// The major number of a version.
pub(crate) fn major(version: &str) -> Option<u64> {
    version.split('.').next()?.parse().ok()
}

/// Refuses an option by its name, and says what to do.
pub(crate) fn unknown_option(of: &str, option: &Attribute, known: &str) -> String {
    format!(
        "{of} has the option `{}`, which expert contract {VERSION} of this host does not have (it \
         has {known}): leave it out, or update the host",
        quote(&option.name)
    )
}

/// A guest's text for a message: escaped and cut.
pub(crate) fn quote(text: &str) -> String {
    let end = text.floor_char_boundary(TEXT_BYTES);
    let cut = if end < text.len() { "..." } else { "" };
    format!("{}{cut}", text[..end].escape_debug())
}

/// The longest name in bytes, and the length to which quoted text is cut.
pub(super) const TEXT_BYTES: usize = 256;

/// The largest factor of a learning rate.
pub(crate) const MAX_FACTOR: f32 = 10.0;

/// The vector that every item can have.
pub(crate) const CONTENT: &str = "content";

/// The host as a plugin sees it, and where the columns of its ids are. A plugin reads a feature of
/// several values under one name, and need not know that it has several.
#[derive(Debug, Clone)]
pub struct HostSchema {
    /// What a plugin is told.
    pub info: HostInfo,
    /// Of each of `info.ids`: among `Target::ids`.
    ids: Vec<IdColumns>,
    /// Of each of `info.history_ids` but the first two: among `Item::ids`.
    item_ids: Vec<IdColumns>,
}

/// The columns of a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct IdColumns {
    pub(crate) first: usize,
    pub(crate) width: usize,
}

/// The ids of the history that every schema has: the item and the surface.
const HISTORY_IDS: [&str; 2] = ["item_id", "surface"];

/// How many values the vectors of a row have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VectorWidths {
    /// The TAE's; 0 without a foundation model.
    pub tae: usize,
    /// The items' content vectors'; 0 without any.
    pub content: usize,
}

impl HostSchema {
    /// Of a schema and the vectors of its rows.
    pub fn new(schema: &Schema, vectors: VectorWidths) -> HostSchema {
        let columns = |fields: Vec<IdField>| {
            let columns = fields.into_iter().map(|field| field.columns);
            columns.map(|of| IdColumns { first: of.start, width: of.len() }).collect()
        };
        HostSchema {
            info: host_info(schema, vectors),
            ids: columns(schema.id_fields()),
            item_ids: columns(IdField::of(&schema.item_features, 0)),
        }
    }

    /// Of a host whose features have one value each.
    pub fn of_single_values(info: HostInfo) -> HostSchema {
        let columns = |count| (0..count).map(|first| IdColumns { first, width: 1 }).collect();
        let items = info.history_ids.len().saturating_sub(HISTORY_IDS.len());
        HostSchema { ids: columns(info.ids.len()), item_ids: columns(items), info }
    }

    /// The columns of the id at `index` among `info.ids`.
    pub(crate) fn id_columns(&self, index: usize) -> IdColumns {
        self.ids[index]
    }

    /// The width of the vector at `index` among those of `info.columns`.
    pub(crate) fn vector_width(&self, index: usize) -> usize {
        self.info.columns[index].width as usize
    }

    /// The columns of the id at `index` among `info.history_ids`; none of the item and the surface.
    pub(crate) fn item_columns(&self, index: usize) -> Option<IdColumns> {
        Some(self.item_ids[index.checked_sub(HISTORY_IDS.len())?])
    }

    /// The values that a column of the network has for each row or event.
    ///
    /// # Errors
    /// The schema lacks it.
    pub fn width(&self, column: &Column) -> Result<usize, String> {
        let index = column.index_in(&self.info)?;
        Ok(match column {
            Column::Tae => self.info.tae_dim as usize,
            Column::Id(_) => self.id_columns(index).width,
            Column::Vector(_) => self.vector_width(index),
            Column::HistoryId(_) => self.item_columns(index).map_or(1, |columns| columns.width),
            Column::HistoryActions => self.info.actions.len(),
            Column::Feature(_) | Column::HistoryAge | Column::Time | Column::Request => 1,
        })
    }
}

/// The host as a plugin sees it: the schema's names, in the order of all indices and bits of the
/// contract, and the widths of its vectors.
pub fn host_info(schema: &Schema, vectors: VectorWidths) -> HostInfo {
    let tasks = schema.tasks.iter().map(|task| SchemaTask {
        name: task.name.clone(),
        kind: match task.kind {
            SchemaTaskKind::Binary => TaskKind::Binary,
            SchemaTaskKind::Regression => TaskKind::Regression,
        },
        label: task.label.clone(),
        surfaces: task.surfaces.clone(),
    });
    // The history's ids: the item, the surface, and the items' categorical features.
    let names = |fields: Vec<IdField>| fields.into_iter().map(|field| field.name);
    let content = (vectors.content > 0)
        .then(|| Column::Vector(CONTENT.to_owned()).offered(vectors.content as u32));
    let built_in = HISTORY_IDS.map(String::from).into_iter();
    HostInfo {
        tae_dim: vectors.tae as u32,
        surfaces: schema.surfaces.clone(),
        actions: schema.actions.clone(),
        values: schema.values.clone(),
        tasks: tasks.collect(),
        features: schema.feature_columns(),
        ids: names(schema.id_fields()).collect(),
        history_ids: built_in.chain(names(IdField::of(&schema.item_features, 0))).collect(),
        columns: content.into_iter().collect(),
    }
}

/// Makes seeds differ from other hashes of a request's id.
const EXPLORATION: u64 = 0x6578_706c_6f72_6521;

/// The request of a `rank` call for all targets of an example.
pub fn rank_request(example: &Example, info: &HostInfo, limit: usize) -> RankRequest {
    RankRequest {
        surface: info.surfaces.get(usize::from(example.surface)).cloned().unwrap_or_default(),
        user: example.user.id,
        time_ms: example.time_ms,
        request: example.request,
        seed: mix64(example.request ^ EXPLORATION),
        candidates: example.targets.iter().map(|target| target.item.id).collect(),
        limit: limit.min(example.targets.len()) as u32,
    }
}

/// What the training hooks receive for all targets of some examples, without further columns.
pub(crate) fn action_batch<'a>(
    examples: impl Iterator<Item = &'a Example> + Clone,
    info: &HostInfo,
) -> ActionBatch {
    let targets = || {
        let of = |example: &'a Example| example.targets.iter().map(move |t| (example, t));
        examples.clone().flat_map(of)
    };
    let values = |(index, name): (usize, &String)| Outcome {
        name: name.clone(),
        values: targets().map(|(_, target)| target.outcome.values[index]).collect(),
    };
    ActionBatch {
        surface: targets().map(|(example, _)| example.surface.into()).collect(),
        actions: targets().map(|(_, target)| target.outcome.actions).collect(),
        known: targets().map(|(_, target)| target.outcome.known).collect(),
        values: info.values.iter().enumerate().map(values).collect(),
        columns: Vec::new(),
    }
}
