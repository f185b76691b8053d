//! Columns by name: what a description declares, and how `rank` and the hooks read them.

use crate::raw::types::{
    ActionBatch, Column, Data, HostInfo, NamedColumn, OfferedColumn, RankRequest, Ranked,
};

impl Column {
    /// The FM's target-aware embedding.
    pub fn tae() -> Self {
        Self::of("tae", "")
    }

    /// A numeric feature: raw for `rank` and hooks, standardised for a network.
    pub fn feature(name: impl Into<String>) -> Self {
        Self::of("feature", name)
    }

    /// A numeric feature as it is, for a network.
    pub fn raw_feature(name: impl Into<String>) -> Self {
        Self::of("raw-feature", name)
    }

    /// A categorical feature or raw id.
    pub fn id(name: impl Into<String>) -> Self {
        Self::of("id", name)
    }

    /// A vector of the item, such as `content`.
    pub fn vector(name: impl Into<String>) -> Self {
        Self::of("vector", name)
    }

    /// The FM's own prediction of a main task of the schema. `rank` and hooks read the log odds of
    /// a binary task, or the value of a regression in the unit of its label.
    pub fn fm_logit(task: impl Into<String>) -> Self {
        Self::of("fm-logit", task)
    }

    /// The time of the row's request, for hooks.
    pub fn time() -> Self {
        Self::of("time", "")
    }

    /// Which request of the batch a row is of, for hooks.
    pub fn request() -> Self {
        Self::of("request", "")
    }

    /// The position at which a daemon ranked the item before it was shown, for hooks.
    pub fn position() -> Self {
        Self::of("ranked-position", "")
    }

    /// The probability that the rule gave for the item at that position, for hooks.
    pub fn propensity() -> Self {
        Self::of("ranked-propensity", "")
    }

    /// A categorical feature of the items in the short history.
    pub fn history_id(name: impl Into<String>) -> Self {
        Self::of("history-id", name)
    }

    /// The actions of the short history.
    pub fn history_actions() -> Self {
        Self::of("history-actions", "")
    }

    /// The age of the short history's events.
    pub fn history_age() -> Self {
        Self::of("history-age", "")
    }

    fn of(kind: &str, name: impl Into<String>) -> Self {
        Self { kind: kind.into(), name: name.into() }
    }
}

impl HostInfo {
    /// The vectors of items that the host has: name and width of each.
    pub fn vectors(&self) -> impl Iterator<Item = (&str, u32)> {
        let vectors = self.columns.iter().filter(|column| column.kind == "vector");
        vectors.map(|OfferedColumn { name, width, .. }| (name.as_str(), *width))
    }

    /// The numeric features that belong to the expert's surface, for [`crate::Graph::feature`] as
    /// those in `features`. They are told to experts whose description names that surface alone.
    pub fn own_features(&self) -> impl Iterator<Item = &str> {
        self.offered("feature")
    }

    /// The categorical features that belong to the expert's surface, as
    /// [`HostInfo::own_features`].
    pub fn own_ids(&self) -> impl Iterator<Item = &str> {
        self.offered("id")
    }

    /// The tasks that the FM predicts itself; none without an FM, or from a host of before.
    pub fn fm_logits(&self) -> impl Iterator<Item = &str> {
        self.offered("fm-logit")
    }

    /// The features that follow the user's own outcomes, whatever is shown and where: counters by
    /// the user alone, and the state of the history, as far as all experts read them. Hosts before
    /// this release name none.
    pub fn user_activity(&self) -> impl Iterator<Item = &str> {
        self.offered("user-activity")
    }

    fn offered<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a str> {
        let of_kind = self.columns.iter().filter(move |column| column.kind == kind);
        of_kind.map(|column| column.name.as_str())
    }
}

/// A host without a schema, from which tests set what they need.
impl Default for HostInfo {
    fn default() -> Self {
        Self {
            tae_dim: 0,
            surfaces: Vec::new(),
            actions: Vec::new(),
            values: Vec::new(),
            tasks: Vec::new(),
            features: Vec::new(),
            ids: Vec::new(),
            history_ids: Vec::new(),
            columns: Vec::new(),
        }
    }
}

/// A request without candidates, from which tests set what they need.
impl Default for RankRequest {
    fn default() -> Self {
        Self {
            surface: String::new(),
            user: 0,
            time_ms: 0,
            request: 0,
            seed: 0,
            candidates: Vec::new(),
            limit: 0,
        }
    }
}

/// A batch without rows, from which tests set what they need.
impl Default for ActionBatch {
    fn default() -> Self {
        Self {
            surface: Vec::new(),
            actions: Vec::new(),
            known: Vec::new(),
            values: Vec::new(),
            columns: Vec::new(),
        }
    }
}

impl Ranked {
    /// A place of a rule that does not explore.
    pub fn new(candidate: u32, score: f32) -> Self {
        Self { candidate, score, propensity: None }
    }
}

/// The columns that a description declares for the training hooks.
///
/// # Errors
/// Each says that the description does not declare the column, and how it does.
impl ActionBatch {
    /// A numeric feature of each row, as it was recorded; 0 where it is missing, which the feature
    /// `NAME_missing` tells apart. Declare it with `Description::training_feature`.
    pub fn feature(&self, name: &str) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::feature(name), "training_feature")
    }

    /// A categorical feature or raw id of each row; of several values the first, and 0 without any.
    /// Declare it with `Description::training_id`.
    pub fn id(&self, name: &str) -> Result<&[u64], String> {
        ids(&self.columns, &Column::id(name), "training_id")
    }

    /// A vector of each row's item, row-major; zeros for an item without one. Declare it with
    /// `Description::training_vector`.
    pub fn vector(&self, name: &str) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::vector(name), "training_vector")
    }

    /// The target-aware embeddings, row-major. Declare them with `Description::training_tae`.
    pub fn tae(&self) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::tae(), "training_tae")
    }

    /// The FM's own prediction of a task: log odds, or the value of a regression; 0 where there is
    /// none. Declare it with `Description::training_fm_logit`.
    pub fn fm_logit(&self, task: &str) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::fm_logit(task), "training_fm_logit")
    }

    /// The time of each row's request, in milliseconds since the epoch. Declare it with
    /// `Description::training_time`.
    pub fn time_ms(&self) -> Result<&[i64], String> {
        integers(&self.columns, &Column::time(), "training_time")
    }

    /// Which request of the batch each row is of, counted from 0. Declare it with
    /// `Description::training_request`.
    pub fn requests(&self) -> Result<&[i64], String> {
        integers(&self.columns, &Column::request(), "training_request")
    }

    /// The position, from 0, at which a daemon ranked each row's item before it was shown; NaN
    /// where that is not known. Declare it with `Description::training_position`.
    pub fn position(&self) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::position(), "training_position")
    }

    /// The probability that the rule gave for the item at that position; NaN where that is not
    /// known, or the rule gave none. Declare it with `Description::training_propensity`.
    pub fn propensity(&self) -> Result<&[f32], String> {
        numbers(&self.columns, &Column::propensity(), "training_propensity")
    }
}

/// The numbers of a column among those that a function received. `declare` is the function of
/// `Description` that declares it.
pub(crate) fn numbers<'c>(
    columns: &'c [NamedColumn],
    wanted: &Column,
    declare: &str,
) -> Result<&'c [f32], String> {
    match find(columns, wanted, declare)? {
        Data::Numbers(values) => Ok(values),
        _ => Err(other_type(wanted, "numbers")),
    }
}

/// The ids of a column, as [`numbers`] finds one.
pub(crate) fn ids<'c>(
    columns: &'c [NamedColumn],
    wanted: &Column,
    declare: &str,
) -> Result<&'c [u64], String> {
    match find(columns, wanted, declare)? {
        Data::Ids(values) => Ok(values),
        _ => Err(other_type(wanted, "ids")),
    }
}

fn integers<'c>(
    columns: &'c [NamedColumn],
    wanted: &Column,
    declare: &str,
) -> Result<&'c [i64], String> {
    match find(columns, wanted, declare)? {
        Data::Integers(values) => Ok(values),
        _ => Err(other_type(wanted, "integers")),
    }
}

fn find<'c>(
    columns: &'c [NamedColumn],
    wanted: &Column,
    declare: &str,
) -> Result<&'c Data, String> {
    let found = columns.iter().find(|own| own.column == *wanted);
    found.map(|own| &own.data).ok_or_else(|| {
        let Column { kind, name } = wanted;
        format!("no column `{kind}` `{name}`: declare it with `Description::{declare}`")
    })
}

fn other_type(Column { kind, name }: &Column, wanted: &str) -> String {
    format!("the column `{kind}` `{name}` does not contain {wanted}")
}
