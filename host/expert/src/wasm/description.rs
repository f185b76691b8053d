//! A plugin's description, once the host knows everything in it.

use std::collections::HashSet;

use hypercast_data::schema::Schema;

use super::contract::{
    Attribute, Column, Limits, Task, Value, WireColumn, WireDescription, quote, unknown_option,
};

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
    /// After how many passes over logs that are no better than the best one training ends; none
    /// where the operator says how many passes there are.
    pub patience: Option<u32>,
}

/// The most passes that a plugin may wait for a better one.
const MAX_PATIENCE: u32 = 1000;

impl ExpertDescription {
    /// Reads what a plugin returned.
    ///
    /// # Errors
    /// It has a kind of columns or an option that this host does not know, or declares a column
    /// twice for one reader; the error names it.
    pub fn read(raw: WireDescription) -> Result<ExpertDescription, String> {
        Ok(ExpertDescription {
            name: raw.name,
            version: raw.version,
            surfaces: raw.surfaces,
            tasks: raw.tasks,
            columns: columns("columns", raw.columns)?,
            rank_columns: columns("rank-columns", raw.rank_columns)?,
            training_columns: columns("training-columns", raw.training_columns)?,
            history_len: raw.history_len,
            fm_version: raw.fm_version,
            limits: raw.limits,
            patience: patience(&raw.options)?,
        })
    }

    /// Whether the network, `rank` or the training hooks read a vector of the items.
    pub fn reads_vectors(&self) -> bool {
        self.all_columns().any(|column| matches!(column, Column::Vector(_)))
    }

    /// The columns that the network, `rank` and the training hooks read.
    pub fn all_columns(&self) -> impl Iterator<Item = &Column> {
        self.columns.iter().chain(&self.rank_columns).chain(&self.training_columns)
    }

    /// The surface that it serves if it serves one alone: what belongs to that surface, it is told.
    pub fn only_surface(&self) -> Option<&str> {
        match &self.surfaces[..] {
            [one] => Some(one),
            _ => None,
        }
    }

    /// Refuses columns that belong to a surface if it serves any other.
    ///
    /// # Errors
    /// It reads one; the error names it.
    pub(crate) fn check_owners(&self, schema: &Schema) -> Result<(), String> {
        for column in self.all_columns() {
            let Some(owner) = column.owner(schema) else { continue };
            if self.only_surface() != Some(owner) {
                let serves = match &self.surfaces[..] {
                    [] => "any surface".to_owned(),
                    all => format!("`{}`", quote(&all.join("`, `"))),
                };
                return Err(format!(
                    "it reads {}, which belongs to surface `{owner}`, and serves {serves}: let its \
                     description name `{owner}` alone, or leave the column out. Nothing is wrong \
                     with the host or its data",
                    column.label()
                ));
            }
        }
        Ok(())
    }
}

/// The only option of a description.
fn patience(options: &[Attribute]) -> Result<Option<u32>, String> {
    let mut patience = None;
    for option in options {
        if option.name != "patience" {
            return Err(unknown_option("its description", option, "`patience`"));
        }
        let passes = match option.value {
            Value::Integer(passes) => u32::try_from(passes).ok(),
            _ => None,
        };
        let passes = passes.filter(|passes| (1..=MAX_PATIENCE).contains(passes));
        patience = Some(passes.ok_or_else(|| {
            let value = quote(&format!("{:?}", option.value));
            format!("its patience is {value}, not an integer in 1..={MAX_PATIENCE}")
        })?);
    }
    Ok(patience)
}

/// Reads a list of columns. Each may stand in it once: the host holds the values of all that are
/// declared, and a description of a few bytes could otherwise ask for gigabytes of them.
fn columns(list: &str, raw: Vec<WireColumn>) -> Result<Vec<Column>, String> {
    let columns = raw.into_iter().map(Column::read).collect::<Result<Vec<_>, _>>()?;
    match repeated(&columns) {
        Some(column) => Err(format!("its {list} hold {} twice; declare it once", column.label())),
        None => Ok(columns),
    }
}

fn repeated(columns: &[Column]) -> Option<&Column> {
    let mut seen = HashSet::new();
    columns.iter().find(|column| !seen.insert(*column))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_stands_once_in_a_list() {
        let read = |columns: &[Column]| super::columns("columns", wire(columns));
        let vector = |name: &str| Column::Vector(name.to_owned());
        let id = Column::Id("content".to_owned());
        let different = [Column::Tae, id, vector("content"), vector("other")];
        assert_eq!(read(&different).unwrap(), different);
        let why = read(&[vector("content"), Column::Tae, vector("content")]).unwrap_err();
        assert!(why.contains("columns hold vector `content` twice"), "{why}");
        let why = read(&[Column::Tae, Column::Tae]).unwrap_err();
        assert!(why.contains("hold tae twice"), "{why}");
    }

    #[test]
    fn two_readers_may_declare_the_same_column() {
        let list = || wire(&[Column::Vector("content".to_owned())]);
        let raw = |rank_columns: Vec<WireColumn>| WireDescription {
            name: "own".into(),
            version: "1.0.0".into(),
            surfaces: Vec::new(),
            tasks: Vec::new(),
            columns: list(),
            rank_columns,
            training_columns: list(),
            history_len: 0,
            fm_version: "*".into(),
            limits: Limits { deadline_ms: 0, memory_mib: 0 },
            options: Vec::new(),
        };
        assert!(ExpertDescription::read(raw(list())).unwrap().reads_vectors());
        let why = ExpertDescription::read(raw([list(), list()].concat())).unwrap_err();
        assert!(why.contains("its rank-columns hold vector `content` twice"), "{why}");
    }

    #[test]
    fn patience_is_a_number_of_passes() {
        let read = |name: &str, value| {
            let name = name.to_owned();
            super::patience(&[Attribute { name, value }])
        };
        assert_eq!(super::patience(&[]), Ok(None));
        assert_eq!(read("patience", Value::Integer(3)), Ok(Some(3)));
        for value in [Value::Integer(0), Value::Integer(1001), Value::Number(3.0)] {
            let why = read("patience", value).unwrap_err();
            assert!(why.contains("patience is") && why.contains("1..=1000"), "{why}");
        }
        let why = read("impatience", Value::Integer(3)).unwrap_err();
        assert!(why.contains("`impatience`") && why.contains("has `patience`"), "{why}");
    }

    fn wire(columns: &[Column]) -> Vec<WireColumn> {
        columns.iter().map(Column::wire).collect()
    }
}
