//! The builder of an expert's description.
//!
//! A description does not list the columns that the network reads: they follow from the network
//! itself (see `Graph`), so an author does not have to repeat them.

use crate::raw::types::{self as wit, Attribute, Column, HostInfo, Limits, Task, TaskKind, Value};

/// Describes an expert to the host: its name, version, tasks, surfaces and limits.
#[derive(Debug, Clone)]
pub struct Description(pub(crate) wit::Description);

impl Description {
    /// Starts the description of an expert for any surface and FM version, with no tasks yet.
    pub fn new(name: &str, version: &str) -> Self {
        Self(wit::Description {
            name: name.into(),
            version: version.into(),
            surfaces: Vec::new(),
            tasks: Vec::new(),
            columns: Vec::new(),
            rank_columns: Vec::new(),
            training_columns: Vec::new(),
            history_len: 0,
            fm_version: "*".into(),
            limits: Limits { deadline_ms: 0, memory_mib: 0 },
            options: Vec::new(),
        })
    }

    /// The tasks so far.
    pub fn tasks(&self) -> &[Task] {
        &self.0.tasks
    }

    /// The surfaces that the expert is limited to; empty means any.
    pub fn served(&self) -> &[String] {
        &self.0.surfaces
    }

    /// Limits the expert to these surfaces. One that names a single surface is told what belongs to
    /// it.
    pub fn surfaces<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.0.surfaces = names.into_iter().map(Into::into).collect();
        self
    }

    /// Adds one task. The default labels use the schema's task, action or value of this name.
    pub fn task(mut self, name: &str, kind: TaskKind) -> Self {
        self.0.tasks.push(Task { name: name.into(), kind });
        self
    }

    /// Adds every task of the host's schema.
    pub fn all_tasks(self, info: &HostInfo) -> Self {
        info.tasks.iter().fold(self, |description, task| description.task(&task.name, task.kind))
    }

    /// Requests a numeric feature for `rank`.
    pub fn rank_feature(self, name: &str) -> Self {
        self.rank(Column::feature(name))
    }

    /// Requests a categorical feature or raw id for `rank`.
    pub fn rank_id(self, name: &str) -> Self {
        self.rank(Column::id(name))
    }

    /// Requests the target-aware embedding for `rank`.
    pub fn rank_tae(self) -> Self {
        self.rank(Column::tae())
    }

    /// Requests a vector of the items, such as `content`, for `rank`.
    pub fn rank_vector(self, name: &str) -> Self {
        self.rank(Column::vector(name))
    }

    /// Requests the FM's own predictions of a task for `rank`.
    pub fn rank_fm_logit(self, task: &str) -> Self {
        self.rank(Column::fm_logit(task))
    }

    /// Requests a numeric feature for the training hooks.
    pub fn training_feature(self, name: &str) -> Self {
        self.training(Column::feature(name))
    }

    /// Requests a categorical feature or raw id for the training hooks.
    pub fn training_id(self, name: &str) -> Self {
        self.training(Column::id(name))
    }

    /// Requests a vector of the items, such as `content`, for the training hooks.
    pub fn training_vector(self, name: &str) -> Self {
        self.training(Column::vector(name))
    }

    /// Requests the target-aware embedding for the training hooks.
    pub fn training_tae(self) -> Self {
        self.training(Column::tae())
    }

    /// Requests the FM's own predictions of a task for the training hooks.
    pub fn training_fm_logit(self, task: &str) -> Self {
        self.training(Column::fm_logit(task))
    }

    /// Requests the time of each row's request for the training hooks.
    pub fn training_time(self) -> Self {
        self.training(Column::time())
    }

    /// Requests which rows are of one request for the training hooks.
    pub fn training_request(self) -> Self {
        self.training(Column::request())
    }

    /// Requests the position at which a daemon ranked each item before it was shown, for the
    /// training hooks.
    pub fn training_position(self) -> Self {
        self.training(Column::position())
    }

    /// Requests the probability that the rule gave for each item at its position, for the training
    /// hooks.
    pub fn training_propensity(self) -> Self {
        self.training(Column::propensity())
    }

    fn rank(mut self, column: Column) -> Self {
        declare(&mut self.0.rank_columns, column);
        self
    }

    fn training(mut self, column: Column) -> Self {
        declare(&mut self.0.training_columns, column);
        self
    }

    /// Sets how many of the user's last events on the surface the history columns contain at most.
    pub fn history_len(mut self, history_len: u32) -> Self {
        self.0.history_len = history_len;
        self
    }

    /// Sets the FM versions that the expert accepts, as a semver requirement.
    pub fn fm_version(mut self, requirement: &str) -> Self {
        self.0.fm_version = requirement.into();
        self
    }

    /// Ends training on logs after so many passes in a row that are no better than the best one
    /// (see [`crate::Expert::validation_score`]), whose parameters are kept. The newest rows, a
    /// tenth or 65,536, are held out to tell. 1 to 1,000; the operator bounds the passes.
    pub fn early_stop(mut self, patience: u32) -> Self {
        self.0.options.retain(|option| option.name != "patience");
        let value = Value::Integer(patience.into());
        self.0.options.push(Attribute { name: "patience".into(), value });
        self
    }

    /// Requests a wall-clock limit for one `rank` call. The host may grant less.
    pub fn deadline_ms(mut self, deadline_ms: u32) -> Self {
        self.0.limits.deadline_ms = deadline_ms;
        self
    }

    /// Requests a limit of linear memory. The host may grant less.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.0.limits.memory_mib = memory_mib;
        self
    }
}

/// Adds a column, unless it is there: a host refuses one that stands twice in a list.
fn declare(columns: &mut Vec<Column>, column: Column) {
    if !columns.contains(&column) {
        columns.push(column);
    }
}
