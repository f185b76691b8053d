//! An example: one request, with what was known when it was made and, in
//! training, what came of it.
//!
//! This is the unit that the host's features stage produces, that the FM and
//! the experts consume, and that the logs hold. It does not know where its
//! parts came from, nor how a model turns them into tensors (see `batch`).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// How many real-valued outcomes an impression can have.
pub const MAX_VALUES: usize = 4;

/// An item, with its features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Item {
    /// The raw id.
    pub id: u64,
    /// Categorical features, one a `schema.item_features` of that kind.
    pub ids: Vec<u64>,
    /// Dense features, likewise.
    pub dense: Vec<f32>,
    /// The content vector, of unit norm; empty for an item without one. No expert column.
    #[serde(with = "shared_slice")]
    pub content: Arc<[f32]>,
}

/// A user, with features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct User {
    /// The raw id.
    pub id: u64,
    /// Categorical features.
    pub ids: Vec<u64>,
    /// Dense features.
    pub dense: Vec<f32>,
}

/// What came of an impression.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Bit i: action i of the schema happened.
    pub actions: u32,
    /// Bit i: whether action i happened is known; tasks on unknown actions are
    /// outside their sample space.
    pub known: u32,
    /// Real-valued outcomes (`schema.values`); NaN where unknown.
    pub values: [f32; MAX_VALUES],
}

impl Outcome {
    /// Nothing known.
    pub const UNKNOWN: Outcome = Outcome { actions: 0, known: 0, values: [f32::NAN; MAX_VALUES] };
}

/// An impression of the past.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// What was shown.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// Where: an index into `schema.surfaces`.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What came of it.
    pub outcome: Outcome,
}

/// A candidate of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Target {
    /// The candidate.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// Every categorical column, in the order of `Schema::id_columns`.
    pub ids: Vec<u64>,
    /// Every numeric column, in the order of `Schema::feature_columns`.
    pub features: Vec<f32>,
    /// What came of it; `Outcome::UNKNOWN` while serving.
    pub outcome: Outcome,
    /// The true probability of each task in a simulated world, else empty.
    pub truth: Vec<f32>,
}

/// One request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Example {
    /// Unique in the data set.
    pub request: u64,
    /// Who asked.
    #[serde(with = "shared")]
    pub user: Arc<User>,
    /// Where: an index into `schema.surfaces`.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The user's last events on all surfaces, oldest first; only outcomes that were known at `time_ms`.
    pub history: Vec<Event>,
    /// The candidates.
    pub targets: Vec<Target>,
}

/// What is shared is written as if it were owned; serde's own feature for that is global and would rebuild all that
/// depends on it.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize, S: Serializer>(
        value: &Arc<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        T::serialize(value, to)
    }

    pub(super) fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error> {
        T::deserialize(from).map(Arc::new)
    }
}

/// As `shared`, for numbers.
mod shared_slice {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &Arc<[f32]>, to: S) -> Result<S::Ok, S::Error> {
        <[f32]>::serialize(value, to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<[f32]>, D::Error> {
        Vec::deserialize(from).map(Arc::from)
    }
}
