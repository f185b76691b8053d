//! The host's bindings of `sdk/wit/expert.wit`, generated from that file, which documents them.
//!
//! Added are the versions of the contract, and the host's schema and examples as plugins see them.
//! Descriptions and columns are those of the host, after they were read.
#![allow(missing_docs, reason = "generated from expert.wit, which documents it")]

use hypercast_core::hash::mix64;
use hypercast_data::schema::growth::EntryKind;
use hypercast_data::schema::{IdField, OwnColumns, Schema, TaskKind as SchemaTaskKind};
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
pub use self::wire::{Expert, ExpertImports, ExpertIndices};

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

/// The name under which `rank` reads the ranking score of a task.
pub fn score_name(task: &str) -> String {
    format!("{task}:score")
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

/// The kind of the columns of vectors.
pub(crate) const VECTOR: &str = "vector";

/// The kind of columns that are the FM's own predictions.
pub(crate) const FM_LOGIT: &str = "fm-logit";

/// The vector that every item can have.
pub(crate) const CONTENT: &str = "content";

/// The kind under which features that follow the user's own outcomes are listed once more. It is
/// no column to read.
const USER_ACTIVITY: &str = "user-activity";

/// The host as a plugin sees it, and where its columns are. A plugin reads a feature of several
/// values under one name, and need not know that it has several.
///
/// A plugin that serves one surface alone is told what belongs to that surface besides the core:
/// actions, values and tasks in their lists, and columns in `columns`, which it asks for by name.
/// So nothing that a team adds for its surface reaches another team's expert, and of its own only
/// those that ask for it.
#[derive(Debug, Clone)]
pub struct HostSchema {
    /// What a plugin is told.
    pub info: HostInfo,
    /// Of each numeric feature that is offered, those of `info.features` first: among
    /// `Target::features`.
    features: Vec<usize>,
    /// Of each categorical feature that is offered, those of `info.ids` first: among
    /// `Target::ids`.
    ids: Vec<IdColumns>,
    outcomes: KnownOutcomes,
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

/// The actions and values that a plugin is told of, by their indices in the schema.
#[derive(Debug, Clone)]
pub(crate) struct KnownOutcomes {
    /// None of all actions that there are, so that bits stay as they are.
    actions: Option<Vec<usize>>,
    values: Vec<usize>,
}

impl KnownOutcomes {
    fn of(schema: &Schema, surface: Option<&str>) -> KnownOutcomes {
        let seen = |kind, names: &[String]| -> Vec<usize> {
            let is_seen = |&at: &usize| schema.is_seen_on(surface, kind, &names[at]);
            (0..names.len()).filter(is_seen).collect()
        };
        let actions = seen(EntryKind::Action, &schema.actions);
        let is_all = actions.len() == schema.actions.len();
        KnownOutcomes {
            actions: (!is_all).then_some(actions),
            values: seen(EntryKind::Value, &schema.values),
        }
    }

    /// The bits of an outcome's actions, as the plugin's list has them.
    pub(crate) fn bits(&self, of_schema: u64) -> u64 {
        let Some(actions) = &self.actions else { return of_schema };
        let bits = actions.iter().enumerate().map(|(at, action)| (of_schema >> action & 1) << at);
        bits.fold(0, |all, bit| all | bit)
    }
}

impl HostSchema {
    /// The core of a schema and the vectors of its rows.
    pub fn new(schema: &Schema, vectors: VectorWidths) -> HostSchema {
        HostSchema::on(None, schema, vectors)
    }

    /// The same with what belongs to a surface.
    pub fn on(surface: Option<&str>, schema: &Schema, vectors: VectorWidths) -> HostSchema {
        let columns =
            |field: &IdField| IdColumns { first: field.columns.start, width: field.columns.len() };
        let own = OwnColumns::of(schema, surface);
        let mut info = host_info(surface, schema, vectors);
        let fields = schema.id_fields();
        let id = |name: &String| {
            let field = fields.iter().find(|field| field.name == *name);
            columns(field.expect("it is one of the schema's"))
        };
        let numbers = schema.feature_columns();
        let number = |name: &String| {
            let place = numbers.iter().position(|column| column == name);
            place.expect("it is one of the schema's")
        };
        let offered = own.features.iter().map(|name| Column::Feature(name.clone()).offered(1));
        info.columns.extend(offered);
        let offered = own.ids.iter().map(|name| {
            let width = id(name).width as u32;
            Column::Id(name.clone()).offered(width)
        });
        info.columns.extend(offered);
        let activity = schema.user_activity_columns();
        let activity = activity.into_iter().filter(|name| info.features.contains(name));
        let activity: Vec<String> = activity.collect();
        info.columns.extend(activity.into_iter().map(|name| OfferedColumn {
            kind: USER_ACTIVITY.to_owned(),
            name,
            width: 1,
        }));
        HostSchema {
            features: info.features.iter().chain(&own.features).map(number).collect(),
            ids: info.ids.iter().chain(&own.ids).map(id).collect(),
            item_ids: IdField::of(&schema.item_features, 0).iter().map(columns).collect(),
            outcomes: KnownOutcomes::of(schema, surface),
            info,
        }
    }

    /// Of a host whose features have one value each.
    pub fn of_single_values(info: HostInfo) -> HostSchema {
        let columns = |count| (0..count).map(|first| IdColumns { first, width: 1 }).collect();
        let items = info.history_ids.len().saturating_sub(HISTORY_IDS.len());
        HostSchema {
            features: (0..info.features.len()).collect(),
            ids: columns(info.ids.len()),
            item_ids: columns(items),
            outcomes: KnownOutcomes { actions: None, values: (0..info.values.len()).collect() },
            info,
        }
    }

    /// Where the feature at `index` among those that are offered is in `Target::features`.
    pub(crate) fn feature(&self, index: usize) -> usize {
        self.features[index]
    }

    /// The actions and values that the plugin is told of.
    pub(crate) fn outcomes(&self) -> &KnownOutcomes {
        &self.outcomes
    }

    /// The columns of the id at `index` among those that are offered.
    pub(crate) fn id_columns(&self, index: usize) -> IdColumns {
        self.ids[index]
    }

    /// The width of the vector at `index` among those of `info.columns`.
    pub(crate) fn vector_width(&self, index: usize) -> usize {
        offered(&self.info, VECTOR).nth(index).map_or(0, |vector| vector.width as usize)
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
            Column::Feature(_) | Column::RawFeature(_) | Column::FmLogit(_) => 1,
            Column::HistoryAge | Column::Time | Column::Request => 1,
            Column::RankedPosition | Column::RankedPropensity => 1,
        })
    }
}

/// The columns of a kind in the list of further columns.
pub(super) fn offered<'a>(
    info: &'a HostInfo,
    kind: &'a str,
) -> impl Iterator<Item = &'a OfferedColumn> {
    info.columns.iter().filter(move |column| column.kind == kind)
}

/// Leaves out the FM's predictions of what a plugin is told.
pub fn withhold_fm_logits(info: &mut HostInfo) {
    info.columns.retain(|column| column.kind != FM_LOGIT);
}

/// The names of a schema that a plugin is told, in the order of all indices and bits of the
/// contract, and the widths of its vectors. Of what belongs to a surface, columns are left out.
fn host_info(surface: Option<&str>, schema: &Schema, vectors: VectorWidths) -> HostInfo {
    let (core, seen) = (schema.core(), schema.seen_on(surface));
    let is_seen = |kind, name: &String| schema.is_seen_on(surface, kind, name);
    let named =
        |kind, names: &[String]| names.iter().filter(|name| is_seen(kind, name)).cloned().collect();
    let tasks = seen.tasks.iter().map(|task| SchemaTask {
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
    let predicted = schema.main_tasks().filter(|_| vectors.tae > 0);
    let fm_logits = predicted.map(|task| Column::FmLogit(task.name.clone()).offered(1));
    let built_in = HISTORY_IDS.map(String::from).into_iter();
    HostInfo {
        tae_dim: vectors.tae as u32,
        surfaces: schema.surfaces.clone(),
        actions: named(EntryKind::Action, &schema.actions),
        values: named(EntryKind::Value, &schema.values),
        tasks: tasks.collect(),
        features: core.feature_columns(),
        ids: names(core.id_fields()).collect(),
        history_ids: built_in.chain(names(IdField::of(&schema.item_features, 0))).collect(),
        columns: content.into_iter().chain(fm_logits).collect(),
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
    outcomes: &KnownOutcomes,
) -> ActionBatch {
    let targets = || {
        let of = |example: &'a Example| example.targets.iter().map(move |t| (example, t));
        examples.clone().flat_map(of)
    };
    let values = |(name, &index): (&String, &usize)| Outcome {
        name: name.clone(),
        values: targets().map(|(_, target)| target.outcome.values[index]).collect(),
    };
    ActionBatch {
        surface: targets().map(|(example, _)| example.surface.into()).collect(),
        actions: targets().map(|(_, target)| outcomes.bits(target.outcome.actions)).collect(),
        known: targets().map(|(_, target)| outcomes.bits(target.outcome.known)).collect(),
        values: info.values.iter().zip(&outcomes.values).map(values).collect(),
        columns: Vec::new(),
    }
}
