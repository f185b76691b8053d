//! A plugin's description, once the host knows everything in it.

use super::contract::{Column, Limits, Task, WireColumn, WireDescription, unknown_option};

/// A plugin's description whose columns and options the host knows.
#[derive(Debug, Clone)]
pub struct ExpertDescription {
    /// The plugin's name.
    pub name: String,
    /// The plugin's own version.
    pub version: String,
    /// The surfaces that it can serve; empty means any.
    pub surfaces: Vec<String>,
    /// What it predicts.
    pub tasks: Vec<Task>,
    /// The columns that its network reads.
    pub columns: Vec<Column>,
    /// The columns that `rank` reads besides the predictions.
    pub rank_columns: Vec<Column>,
    /// The columns that `labels` and `sample` read besides the outcomes.
    pub training_columns: Vec<Column>,
    /// The most events that its history columns contain.
    pub history_len: u32,
    /// The FM versions that it accepts, as a semver requirement.
    pub fm_version: String,
    /// What it asks for itself.
    pub limits: Limits,
}

impl ExpertDescription {
    /// Reads what a plugin returned.
    ///
    /// # Errors
    /// It has a kind of columns or an option that this host does not know; the error names it.
    pub fn read(raw: WireDescription) -> Result<ExpertDescription, String> {
        if let Some(option) = raw.options.first() {
            return Err(unknown_option("its description", option, "none"));
        }
        let columns =
            |raw: Vec<WireColumn>| raw.into_iter().map(Column::read).collect::<Result<Vec<_>, _>>();
        Ok(ExpertDescription {
            name: raw.name,
            version: raw.version,
            surfaces: raw.surfaces,
            tasks: raw.tasks,
            columns: columns(raw.columns)?,
            rank_columns: columns(raw.rank_columns)?,
            training_columns: columns(raw.training_columns)?,
            history_len: raw.history_len,
            fm_version: raw.fm_version,
            limits: raw.limits,
        })
    }
}
