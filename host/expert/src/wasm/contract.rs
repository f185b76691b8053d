//! The host's side of `sdk/wit/expert.wit`, generated from the file itself.
//!
//! Everything in here is documented there. It adds only the contract's version
//! and what the host tells a plugin about its schema.
#![allow(missing_docs, reason = "generated from expert.wit, which documents it")]

use hypercast_data::schema::{FeatureKind, Schema, TaskKind as SchemaTaskKind};

wasmtime::component::bindgen!({ path: "../../sdk/wit", world: "expert" });

pub use self::hypercast::expert::types::*;

/// The version of the contract that this host speaks.
pub const VERSION: &str = "2.0.0";

/// The component import that carries the contract's version.
pub const TYPES_IMPORT: &str = "hypercast:expert/types@";

/// What the host tells a plugin at load: the schema's names, in the order that
/// every index and bit of the contract uses, and the width of the TAE (0
/// without a foundation model).
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

/// The names of the history's id columns: the item, the surface, and the
/// items' categorical features, in the schema's order.
pub fn history_id_columns(schema: &Schema) -> Vec<String> {
    let categorical =
        schema.item_features.iter().filter(|feature| feature.kind == FeatureKind::Categorical);
    let built_in = ["item_id", "surface"].map(String::from);
    built_in.into_iter().chain(categorical.map(|feature| feature.name.clone())).collect()
}

impl Column {
    /// The column's name in words, for messages.
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
