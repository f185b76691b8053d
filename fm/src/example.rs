//! An example: one request, with what was known when it was made and, in
//! training, what came of it.
//!
//! This is the unit that the host's features stage produces, that the FM and
//! the experts consume, and that the logs hold. It does not know where its
//! parts came from, nor how a model turns them into tensors (see `batch`).

use std::sync::Arc;

/// How many real-valued outcomes an impression can have.
pub const MAX_VALUES: usize = 4;

/// An item, with its features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Item {
    /// The raw id.
    pub id: u64,
    /// Categorical features, one a `schema.item_features` of that kind.
    pub ids: Vec<u64>,
    /// Dense features, likewise.
    pub dense: Vec<f32>,
    /// The content vector, of unit norm; empty for an item without one. No expert column.
    pub content: Arc<[f32]>,
}

/// A user, with features in the schema's order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct User {
    /// The raw id.
    pub id: u64,
    /// Categorical features.
    pub ids: Vec<u64>,
    /// Dense features.
    pub dense: Vec<f32>,
}

/// What came of an impression.
#[derive(Debug, Clone, Copy, PartialEq)]
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
#[derive(Debug, Clone)]
pub struct Event {
    /// What was shown.
    pub item: Arc<Item>,
    /// Where: an index into `schema.surfaces`.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
    /// What came of it.
    pub outcome: Outcome,
}

/// A candidate of a request.
#[derive(Debug, Clone)]
pub struct Target {
    /// The candidate.
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
#[derive(Debug, Clone)]
pub struct Example {
    /// Unique in the data set.
    pub request: u64,
    /// Who asked.
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
