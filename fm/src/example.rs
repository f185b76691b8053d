//! An example: one request with everything that was known when it was made and, in training, the
//! outcomes of its candidates.
//!
//! Examples are produced by the host's feature stage, consumed by the FM and the experts, and
//! stored in feature logs. How a model turns them into tensors is in [`crate::batch`].

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The most real values that an outcome can have.
pub const MAX_VALUES: usize = 4;

/// An item, with its features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Item {
    /// The id in the data set.
    pub id: u64,
    /// One value per categorical feature of `schema.item_features`.
    pub ids: Vec<u64>,
    /// One value per dense feature of `schema.item_features`.
    pub dense: Vec<f32>,
    /// The content vector, of unit norm; empty for an item without one.
    #[serde(with = "shared")]
    pub content: Arc<[f32]>,
}

/// A user, with features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct User {
    /// The id in the data set.
    pub id: u64,
    /// One value per categorical user feature.
    pub ids: Vec<u64>,
    /// One value per dense user feature.
    pub dense: Vec<f32>,
}

/// The outcome of an impression.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Bit i: action i of the schema happened.
    pub actions: u32,
    /// Bit i: it is known whether action i happened. An impression is outside the sample space of
    /// tasks on unknown actions.
    pub known: u32,
    /// Real-valued outcomes (`schema.values`); NaN where unknown.
    pub values: [f32; MAX_VALUES],
}

impl Outcome {
    /// An outcome of which nothing is known.
    pub const UNKNOWN: Outcome = Outcome { actions: 0, known: 0, values: [f32::NAN; MAX_VALUES] };
}

/// A past impression in a user's history.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Event {
    /// The item that was shown.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// The surface, an index into `schema.surfaces`.
    pub surface: u16,
    /// When it was shown, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What the user did with it.
    pub outcome: Outcome,
}

/// A candidate of a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Target {
    /// The candidate item.
    #[serde(with = "shared")]
    pub item: Arc<Item>,
    /// The categorical columns, in the order of `Schema::id_columns`.
    pub ids: Vec<u64>,
    /// The numeric columns, in the order of `Schema::feature_columns`.
    pub features: Vec<f32>,
    /// The outcome; `Outcome::UNKNOWN` while serving.
    pub outcome: Outcome,
    /// `[tasks]`: the true probabilities in simulated data, otherwise empty.
    pub truth: Vec<f32>,
}

/// One request: the unit of training, logging and serving.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Example {
    /// The request's id, unique in the data set.
    pub request: u64,
    /// The user who made the request.
    #[serde(with = "shared")]
    pub user: Arc<User>,
    /// The surface, an index into `schema.surfaces`.
    pub surface: u16,
    /// When it was made, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The user's last events on all surfaces, oldest first, with the outcomes known at `time_ms`.
    pub history: Vec<Event>,
    /// The candidates.
    pub targets: Vec<Target>,
}

/// Serialises an `Arc` as its value. Serde's feature for this would apply to the whole workspace
/// and rebuild everything that depends on serde.
mod shared {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<T: Serialize + ?Sized, S: Serializer>(
        value: &Arc<T>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        T::serialize(value, to)
    }

    pub(super) fn deserialize<'de, T: ?Sized, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Arc<T>, D::Error>
    where
        Box<T>: Deserialize<'de>,
    {
        Box::deserialize(from).map(Arc::from)
    }
}
