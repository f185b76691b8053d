//! The host's bindings of `sdk/wit/expert.wit`, generated from that file, which documents them.
//!
//! Added are the contract's version, and the host's schema and examples as plugins see them.
#![allow(missing_docs, reason = "generated from expert.wit, which documents it")]

use hypercast_data::schema::{IdField, Schema, Task as LoggedTask, TaskKind as SchemaTaskKind};
use hypercast_fm::example::Example;

use super::check::quote;

wasmtime::component::bindgen!({ path: "../../sdk/wit", world: "expert" });

pub use self::hypercast::expert::types::*;

/// The version of the contract that this host implements.
pub const VERSION: &str = "2.0.0";

/// The bits of the contract's masks of actions. Plugins are not told of the actions behind them.
const MASK_BITS: usize = u32::BITS as usize;

/// The component import whose suffix is the contract's version.
pub const TYPES_IMPORT: &str = "hypercast:expert/types@";

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

impl HostSchema {
    /// Of a schema and the TAE's number of values (0 without a foundation model).
    pub fn new(schema: &Schema, tae_dim: usize) -> HostSchema {
        let columns = |fields: Vec<IdField>| {
            let columns = fields.into_iter().map(|field| field.columns);
            columns.map(|of| IdColumns { first: of.start, width: of.len() }).collect()
        };
        HostSchema {
            info: host_info(schema, tae_dim),
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

    /// The columns of the id at `index` among `info.history_ids`; none of the item and the surface.
    pub(crate) fn item_columns(&self, index: usize) -> Option<IdColumns> {
        Some(self.item_ids[index.checked_sub(HISTORY_IDS.len())?])
    }

    /// The values that a column of ids has for each row or event.
    ///
    /// # Errors
    /// The schema lacks it.
    pub fn width(&self, column: &Column) -> Result<usize, String> {
        let index = column.index_in(&self.info)?;
        Ok(match column {
            Column::Id(_) => self.id_columns(index).width,
            _ => self.item_columns(index).map_or(1, |columns| columns.width),
        })
    }
}

/// The actions of which plugins know: those that masks have room for.
pub(crate) fn offered_actions(schema: &Schema) -> &[String] {
    &schema.actions[..schema.actions.len().min(MASK_BITS)]
}

/// The host as a plugin sees it: the schema's names, in the order of all indices and bits of the
/// contract, and the TAE's number of values (0 without a foundation model). Of actions and tasks it
/// has those that fit the contract's masks.
pub fn host_info(schema: &Schema, tae_dim: usize) -> HostInfo {
    let actions = offered_actions(schema);
    let is_offered = |task: &&LoggedTask| {
        task.kind == SchemaTaskKind::Regression || actions.contains(&task.label)
    };
    let tasks = schema.tasks.iter().filter(is_offered).map(|task| SchemaTask {
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
    let built_in = HISTORY_IDS.map(String::from).into_iter();
    HostInfo {
        tae_dim: tae_dim as u32,
        surfaces: schema.surfaces.clone(),
        actions: actions.to_vec(),
        values: schema.values.clone(),
        tasks: tasks.collect(),
        features: schema.feature_columns(),
        ids: names(schema.id_fields()).collect(),
        history_ids: built_in.chain(names(IdField::of(&schema.item_features, 0))).collect(),
    }
}

/// The request of a `rank` call for all targets of an example.
pub fn rank_request(example: &Example, info: &HostInfo, limit: usize) -> RankRequest {
    RankRequest {
        surface: info.surfaces.get(usize::from(example.surface)).cloned().unwrap_or_default(),
        user: example.user.id,
        time_ms: example.time_ms,
        candidates: example.targets.iter().map(|target| target.item.id).collect(),
        limit: limit.min(example.targets.len()) as u32,
    }
}

/// What the training hooks receive for all targets of some examples.
pub fn action_batch<'a>(
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
        actions: targets().map(|(_, target)| target.outcome.actions as u32).collect(),
        known: targets().map(|(_, target)| target.outcome.known as u32).collect(),
        values: info.values.iter().enumerate().map(values).collect(),
    }
}

impl Column {
    /// The column's kind and name, for messages.
    pub fn label(&self) -> String {
        match self {
            Column::Tae => "tae".into(),
            Column::Feature(name) => format!("feature `{}`", quote(name)),
            Column::Id(name) => format!("id `{}`", quote(name)),
            Column::HistoryId(name) => format!("history id `{}`", quote(name)),
            Column::HistoryActions => "history actions".into(),
            Column::HistoryAge => "history age".into(),
        }
    }

    /// The index of its name among the host's columns of its kind; 0 for a kind without names.
    ///
    /// # Errors
    /// The schema lacks it.
    pub(crate) fn index_in(&self, info: &HostInfo) -> Result<usize, String> {
        let (name, known) = match self {
            Column::Tae | Column::HistoryActions | Column::HistoryAge => return Ok(0),
            Column::Feature(name) => (name, &info.features),
            Column::Id(name) => (name, &info.ids),
            Column::HistoryId(name) => (name, &info.history_ids),
        };
        known.iter().position(|known| known == name).ok_or_else(|| {
            let (label, known) = (self.label(), known.join("`, `"));
            format!("it reads {label}, which the schema lacks (it has `{known}`)")
        })
    }

    /// Whether it is a column of the short history.
    pub(crate) fn is_history(&self) -> bool {
        matches!(self, Column::HistoryId(_) | Column::HistoryActions | Column::HistoryAge)
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::MAX_ACTIONS;

    use super::*;
    use crate::tests::build::{TAE_DIM, example, schema};

    #[test]
    fn a_plugin_is_offered_the_actions_that_its_masks_have_bits_for() {
        let mut schema = schema();
        let more = (schema.actions.len()..MAX_ACTIONS).map(|at| format!("action{at}"));
        schema.actions.extend(more);
        let task = |label: &str, kind| LoggedTask {
            name: format!("{label}_task"),
            label: label.into(),
            kind,
            ..schema.tasks[0].clone()
        };
        schema.tasks = vec![
            task("action31", SchemaTaskKind::Binary),
            task("action32", SchemaTaskKind::Binary),
            task("seconds", SchemaTaskKind::Regression),
        ];
        let info = host_info(&schema, TAE_DIM);
        assert_eq!(info.actions, schema.actions[..32]);
        let tasks: Vec<&str> = info.tasks.iter().map(|task| &*task.label).collect();
        assert_eq!(tasks, ["action31", "seconds"]);
        let mut example = example(1, 0, 2);
        example.targets[1].outcome.actions = 1 << 40 | 1 << 31 | 1;
        example.targets[1].outcome.known = u64::MAX;
        let batch = action_batch(std::iter::once(&example), &info);
        assert_eq!((batch.actions[1], batch.known[1]), (1 << 31 | 1, u32::MAX));
    }
}
