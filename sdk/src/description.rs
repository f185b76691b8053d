//! What an expert says of itself, as a builder.
//!
//! The columns that the network reads are not part of it: they follow from the
//! network (see `Graph`), so nobody lists them twice.

use crate::raw::types::{self as wit, Column, HostInfo, Limits, Task, TaskKind};

/// An expert's description.
#[derive(Debug, Clone)]
pub struct Description {
    name: String,
    version: String,
    surfaces: Vec<String>,
    pub(crate) tasks: Vec<Task>,
    rank_columns: Vec<Column>,
    pub(crate) history_len: u32,
    fm_version: String,
    limits: Limits,
}

impl Description {
    /// An expert for any surface and any FM version, without tasks yet.
    pub fn new(name: &str, version: &str) -> Self {
        Self {
            name: name.into(),
            version: version.into(),
            surfaces: Vec::new(),
            tasks: Vec::new(),
            rank_columns: Vec::new(),
            history_len: 0,
            fm_version: "*".into(),
            limits: Limits { deadline_ms: 0, memory_mib: 0 },
        }
    }

    /// The surfaces that it can serve.
    pub fn surfaces<N: Into<String>>(self, names: impl IntoIterator<Item = N>) -> Self {
        Self { surfaces: names.into_iter().map(Into::into).collect(), ..self }
    }

    /// One task. The default labels take the schema's task, action or value of this name.
    pub fn task(mut self, name: &str, kind: TaskKind) -> Self {
        self.tasks.push(Task { name: name.into(), kind });
        self
    }

    /// All tasks of the host's schema.
    pub fn all_tasks(self, info: &HostInfo) -> Self {
        info.tasks.iter().fold(self, |description, task| description.task(&task.name, task.kind))
    }

    /// A numeric feature that `rank` reads.
    pub fn rank_feature(mut self, name: &str) -> Self {
        self.rank_columns.push(Column::Feature(name.into()));
        self
    }

    /// A categorical feature or raw id that `rank` reads.
    pub fn rank_id(mut self, name: &str) -> Self {
        self.rank_columns.push(Column::Id(name.into()));
        self
    }

    /// `rank` reads the target-aware embedding.
    pub fn rank_tae(mut self) -> Self {
        self.rank_columns.push(Column::Tae);
        self
    }

    /// How many of the user's last events on the surface the history columns hold, at most.
    pub fn history_len(self, history_len: u32) -> Self {
        Self { history_len, ..self }
    }

    /// The FM versions that it accepts, as a semver requirement.
    pub fn fm_version(self, requirement: &str) -> Self {
        Self { fm_version: requirement.into(), ..self }
    }

    /// The wall-clock limit of one `rank` call that it asks for.
    pub fn deadline_ms(mut self, deadline_ms: u32) -> Self {
        self.limits.deadline_ms = deadline_ms;
        self
    }

    /// The memory limit that it asks for.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.limits.memory_mib = memory_mib;
        self
    }

    pub(crate) fn into_wit(self, columns: Vec<Column>) -> wit::Description {
        wit::Description {
            name: self.name,
            version: self.version,
            surfaces: self.surfaces,
            tasks: self.tasks,
            columns,
            rank_columns: self.rank_columns,
            history_len: self.history_len,
            fm_version: self.fm_version,
            limits: self.limits,
        }
    }
}
