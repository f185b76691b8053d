//! The host's bindings of `sdk/wit/expert.wit`, generated from that file, which documents them.
//!
//! Added are the contract's version and the host's schema as plugins see it.
#![allow(missing_docs, reason = "generated from expert.wit, which documents it")]

use hypercast_data::schema::{FeatureKind, Schema, TaskKind as SchemaTaskKind};

wasmtime::component::bindgen!({ path: "../../sdk/wit", world: "expert" });

pub use self::hypercast::expert::types::*;

/// The version of the contract that this host implements.
pub const VERSION: &str = "2.0.0";

/// The component import whose suffix is the contract's version.
pub const TYPES_IMPORT: &str = "hypercast:expert/types@";

/// The host as a plugin sees it: the schema's names, in the order of all indices and bits of the
/// contract, and the TAE's number of values (0 without a foundation model).
pub fn host_info(schema: &Schema, tae_dim: usize) -> HostInfo {
    let tasks = schema.tasks.iter().map(|task| SchemaTask {
        name: task.name.clone(),
        kind: match task.kind {
            SchemaTaskKind::Binary => TaskKind::Binary,
            SchemaTaskKind::Regression => TaskKind::Regression,
        },
        label: task.label.clone(),
        surfaces: task.surfaces.clone(),
    });
    HostInfo {
        tae_dim: tae_dim as u32,
        surfaces: schema.surfaces.clone(),
        actions: schema.actions.clone(),
        values: schema.values.clone(),
        tasks: tasks.collect(),
        features: schema.feature_columns(),
        ids: schema.id_columns(),
        history_ids: history_id_columns(schema),
    }
}

/// The names of the history's id columns: the item, the surface, and the items' categorical
/// features in the schema's order.
pub fn history_id_columns(schema: &Schema) -> Vec<String> {
    let categorical =
        schema.item_features.iter().filter(|feature| feature.kind == FeatureKind::Categorical);
    let built_in = ["item_id", "surface"].map(String::from);
    built_in.into_iter().chain(categorical.map(|feature| feature.name.clone())).collect()
}

impl Column {
    /// The column's kind and name, for messages.
    pub fn label(&self) -> String {
        match self {
            Column::Tae => "tae".into(),
            Column::Feature(name) => format!("feature `{name}`"),
            Column::Id(name) => format!("id `{name}`"),
            Column::HistoryId(name) => format!("history id `{name}`"),
            Column::HistoryActions => "history actions".into(),
            Column::HistoryAge => "history age".into(),
        }
    }
}
