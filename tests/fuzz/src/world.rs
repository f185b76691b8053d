//! A small schema with every kind of feature, and requests of it.

use std::sync::Arc;

use hypercast_data::schema::{Counter, Feature, FeatureKind, Schema, Task, TaskKind, TaskRole};
use hypercast_expert::wasm::contract::{HostSchema, VectorWidths};
use hypercast_fm::example::{Event, Example, Item, MAX_VALUES, Outcome, Target, User};

/// The width of a target-aware embedding.
pub const TAE_DIM: usize = 4;

/// The vectors of a row.
pub const VECTORS: VectorWidths = VectorWidths { tae: TAE_DIM, content: 3 };

/// Two surfaces, four actions, a value, features of all kinds, and counters with and without decay.
pub fn schema() -> Schema {
    let task = |name: &str, kind| Task {
        name: name.into(),
        role: TaskRole::Main,
        kind,
        label: name.into(),
        transform: Default::default(),
        surfaces: Vec::new(),
        weight: 1.0,
    };
    let feature = |name: &str, kind| Feature::new(name, kind);
    let counter = |name: &str, key: &[&str], half_life_days| Counter {
        name: name.into(),
        key: key.iter().map(|key| (*key).into()).collect(),
        action: "click".into(),
        half_life_days,
    };
    Schema {
        surfaces: vec!["feed".into(), "reels".into()],
        actions: ["click", "like", "share", "hide"].map(String::from).to_vec(),
        values: vec!["seconds".into()],
        tasks: vec![task("click", TaskKind::Binary), task("seconds", TaskKind::Regression)],
        item_features: vec![
            feature("tag", FeatureKind::Categorical),
            feature("length", FeatureKind::Dense),
        ],
        user_features: vec![feature("age", FeatureKind::Dense)],
        context_features: vec![
            feature("network", FeatureKind::Categorical),
            feature("load", FeatureKind::Dense),
        ],
        counters: vec![
            counter("item", &["item_id"], 0.0),
            counter("user_tag", &["user_id", "tag"], 1.0),
        ],
        ids: Default::default(),
        retired: Vec::new(),
        owned: Default::default(),
        alignment: Default::default(),
        earlier: Vec::new(),
        ranges: Vec::new(),
    }
}

/// The schema as plugins receive it.
pub fn host() -> HostSchema {
    HostSchema::new(&schema(), VECTORS)
}

/// Pseudo-random values in -1..1.
pub fn noise(seed: u64, count: usize) -> Vec<f32> {
    let value = |index: u64| {
        let hash = hypercast_core::hash::mix64(
            seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index),
        );
        (hash >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count as u64).map(value).collect()
}

/// A request with `targets` candidates, `history` events on its surface and as many on the other.
/// `seed` affects all values but no sizes.
pub fn example(seed: u64, history: usize, targets: usize) -> Example {
    let schema = schema();
    let (ids, features) = (schema.id_columns().len(), schema.feature_columns().len());
    let item = |id: u64| {
        Arc::new(Item { id, ids: vec![id % 7], dense: vec![id as f32], ..Item::default() })
    };
    let event = |index: usize| Event {
        item: item(seed * 31 + index as u64),
        surface: (index % 2) as u16,
        time_ms: 1_000_000 - 3_000 * (2 * history - index) as i64,
        outcome: Outcome {
            actions: seed.wrapping_add(index as u64) % 16,
            known: 15,
            ..Outcome::UNKNOWN
        },
    };
    let target = |index: usize| {
        let id = seed * 17 + index as u64;
        Target {
            item: item(id),
            ids: (0..ids as u64).map(|column| id.wrapping_mul(column + 3)).collect(),
            features: noise(id, features),
            outcome: Outcome { actions: id % 16, known: 15, values: [1.0; MAX_VALUES] },
            truth: Vec::new(),
        }
    };
    Example {
        request: seed,
        user: Arc::new(User { id: seed, ids: vec![], dense: vec![1.0] }),
        surface: 0,
        time_ms: 1_000_000,
        history: (0..2 * history).map(event).collect(),
        targets: (0..targets).map(target).collect(),
    }
}
