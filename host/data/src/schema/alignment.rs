//! A surface's own alignment module in the foundation model: what it reads, how large it is, and
//! which of the surface's own tasks it learns (paper section 3.1.3).
//!
//! Only the FM's trainer is told of modules, and shown what they read
//! ([`super::CoreColumns::for_trainer`]). What serves is made for the core alone, so a module may
//! read what belongs to its surface, and may change at any time: no stored record depends on it.

use std::collections::BTreeSet;

use hypercast_fm::alignment_spec::{AlignmentId, AlignmentSpec};
use hypercast_fm::growth::SpecGrowth;
use hypercast_fm::spec::FmSpec;
use hypercast_fm::training_only::TrainingOnlyColumns;
use serde::{Deserialize, Serialize};

use super::fm_spec::{example_spec, spec_growths, task_spec};
use super::growth::EntryKind;
use super::{IdField, Schema, Task, TaskRole};
use crate::error::{Error, Result};

/// The most hidden layers of a module. It is to be light: what it cannot tell from the TAE shapes
/// the TAE.
const MAX_LAYERS: usize = 4;

/// The widest hidden layer.
const MAX_WIDTH: usize = 512;

/// The alignment module that a surface's team declares: `[alignment.SURFACE]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SurfaceAlignment {
    /// The widths of its hidden layers.
    pub hidden: Vec<usize>,
    /// The numeric columns that it reads, of the core and of the surface's own, by name; all of the
    /// core's without it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// The categorical features that it reads, of the core and of the surface's own, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<String>,
    /// The tasks that belong to the surface and that the FM learns through the module. Auxiliary
    /// tasks of the core are learned on each surface where they are valid.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
}

impl Default for SurfaceAlignment {
    fn default() -> Self {
        Self { hidden: vec![32], features: None, ids: Vec::new(), tasks: Vec::new() }
    }
}

/// What the FM's trainer is told of a schema: its core, and the alignment modules of surfaces.
///
/// # Errors
/// As [`super::fm_spec`].
pub fn trainer_spec(schema: &Schema) -> Result<FmSpec> {
    let mut spec = example_spec(&schema.core())?;
    let is_own = |task: &&Task| schema.alignment.values().any(|own| own.tasks.contains(&task.name));
    for task in schema.tasks.iter().filter(is_own) {
        spec.tasks.push(task_spec(schema, task)?);
    }
    let hidden = schema.training_only_columns();
    spec.alignments.extend(schema.alignment.iter().map(|(surface, own)| {
        let AlignedColumns { ids, features } = AlignedColumns::of(schema, surface);
        let within = |all: &[usize], own: &[usize]| -> Vec<usize> {
            let is_hidden = |&at: &usize| all.contains(&own[at]);
            (0..own.len()).filter(is_hidden).collect()
        };
        let fields = own.fields(schema);
        let id = |field: IdField| AlignmentId { name: field.name, columns: field.columns.len() };
        let spec = AlignmentSpec {
            hidden: own.hidden.clone(),
            features: own.features.clone(),
            ids: fields.into_iter().map(id).collect(),
            tasks: own.tasks.clone(),
            training_only: TrainingOnlyColumns {
                ids: within(&hidden.ids, &ids),
                numbers: within(&hidden.numbers, &features),
                missing: within(&hidden.missing, &features),
            },
        };
        (surface.clone(), spec)
    }));
    spec.validate()?;
    Ok(spec)
}

/// From what trainers of each layout of a schema were made for to what they are now.
///
/// # Errors
/// As [`super::fm_spec`].
pub fn trainer_growths(schema: &Schema) -> Result<Vec<SpecGrowth>> {
    let to = trainer_spec(schema)?;
    let growths = spec_growths(schema)?.into_iter();
    Ok(growths.map(|growth| SpecGrowth { to: to.clone(), ..growth }).collect())
}

/// Where what a surface's module reads besides the core's columns is in a schema's columns.
#[derive(Debug, Clone, Default)]
pub(super) struct AlignedColumns {
    /// The places in `Target::ids`.
    pub(super) ids: Vec<usize>,
    /// The places in `Target::features`.
    pub(super) features: Vec<usize>,
}

impl AlignedColumns {
    /// Those of a surface; none without a module of its own.
    pub(super) fn of(schema: &Schema, surface: &str) -> AlignedColumns {
        let Some(own) = schema.alignment.get(surface) else { return AlignedColumns::default() };
        let columns = schema.feature_columns();
        let place = |name: &String| columns.iter().position(|column| column == name);
        AlignedColumns {
            ids: own.fields(schema).into_iter().flat_map(|field| field.columns).collect(),
            features: own.features.iter().flatten().filter_map(place).collect(),
        }
    }

    /// Whether the core's columns are all that it reads, as they stand.
    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty() && self.features.is_empty()
    }
}

impl SurfaceAlignment {
    /// The categorical features that it reads, with their columns in the schema.
    fn fields(&self, schema: &Schema) -> Vec<IdField> {
        let all = schema.id_fields();
        let field = |name: &String| all.iter().find(|field| field.name == *name).cloned();
        self.ids.iter().filter_map(field).collect()
    }
}

impl Schema {
    /// The labels of the tasks that a surface's module learns, as places in `actions` or `values`.
    pub(super) fn aligned_labels(&self, surface: &str, kind: EntryKind) -> Vec<usize> {
        let own = self.alignment.get(surface).into_iter().flat_map(|own| &own.tasks);
        let tasks = own.filter_map(|name| self.task(name)).map(|task| &self.tasks[task]);
        let labels = tasks.filter(|task| self.is_label(task, kind)).map(|task| &task.label);
        let place = |label| self.names_of(kind).position(|name| name == label);
        labels.filter_map(place).collect()
    }

    /// Checks that modules are of surfaces that there are, and read and learn what those may see.
    pub(super) fn validate_alignment(&self) -> Result<()> {
        for (surface, own) in &self.alignment {
            if !self.surfaces.contains(surface) {
                let known = self.surfaces.join(", ");
                let why = format!("no surface has this name; there are: {known}");
                return Err(Error::Schema(format!("alignment.{surface}: {why}")));
            }
            let why = own.size_fault().or_else(|| self.alignment_fault(surface, own));
            if let Some(why) = why {
                return Err(Error::Schema(format!("alignment.{surface}: {why}")));
            }
        }
        Ok(())
    }

    fn alignment_fault(&self, surface: &str, own: &SurfaceAlignment) -> Option<String> {
        let fields = |schema: &Schema| schema.id_fields().into_iter().map(|field| field.name);
        let ids = |schema: &Schema| fields(schema).collect();
        let features = own.features.as_deref().unwrap_or_default();
        self.column_fault(surface, "numeric column", features, Schema::feature_columns)
            .or_else(|| self.column_fault(surface, "categorical feature", &own.ids, ids))
            .or_else(|| self.aligned_task_fault(surface, own))
    }

    /// What is wrong with the names of the columns of a kind that a module reads.
    fn column_fault(
        &self,
        surface: &str,
        what: &str,
        names: &[String],
        columns: impl Fn(&Schema) -> Vec<String>,
    ) -> Option<String> {
        let seen = columns(&self.seen_on(Some(surface)));
        let fault = |(at, name): (usize, &String)| {
            if names[..at].contains(name) {
                return Some(format!("{what} `{name}` is named twice"));
            }
            if seen.contains(name) {
                return None;
            }
            let sees = |other: &&String| columns(&self.seen_on(Some(other))).contains(name);
            Some(match self.owned.keys().find(sees) {
                Some(other) => format!(
                    "{what} `{name}` belongs to surface `{other}`; name one of the core or of \
                     `{surface}`"
                ),
                None => format!("no {what} is called `{name}`; there are: {}", seen.join(", ")),
            })
        };
        names.iter().enumerate().find_map(fault)
    }

    fn aligned_task_fault(&self, surface: &str, own: &SurfaceAlignment) -> Option<String> {
        let fault = |(at, name): (usize, &String)| {
            if own.tasks[..at].contains(name) {
                return Some(format!("task `{name}` is named twice"));
            }
            let Some(task) = self.task(name) else {
                return Some(format!("no task is called `{name}`"));
            };
            match self.owner(EntryKind::Task, name) {
                Some(owner) if owner == surface => None,
                Some(other) => Some(format!("task `{name}` belongs to surface `{other}`")),
                None if self.tasks[task].role == TaskRole::Main => Some(format!(
                    "task `{name}` is a main task; only auxiliary tasks are learned by a module"
                )),
                None => Some(format!(
                    "task `{name}` belongs to all, and is learned wherever it is valid; leave it out"
                )),
            }
        };
        let is_learned = |task: &Task| {
            let is_core = self.owner(EntryKind::Task, &task.name).is_none();
            task.role == TaskRole::Auxiliary && is_core && task.is_valid_on(surface)
        };
        let has_task = !own.tasks.is_empty() || self.tasks.iter().any(is_learned);
        let nothing = || {
            format!(
                "it has nothing to learn: no auxiliary task is valid on `{surface}`; name one that \
                 belongs to the surface in `tasks`"
            )
        };
        let first = own.tasks.iter().enumerate().find_map(fault);
        first.or_else(|| (!has_task).then(nothing))
    }
}

impl SurfaceAlignment {
    /// What is wrong with its size.
    fn size_fault(&self) -> Option<String> {
        let is_fit = (1..=MAX_LAYERS).contains(&self.hidden.len())
            && self.hidden.iter().all(|width| (1..=MAX_WIDTH).contains(width));
        (!is_fit).then(|| {
            format!(
                "hidden is {:?}; it must be 1 to {MAX_LAYERS} widths of 1 to {MAX_WIDTH}",
                self.hidden
            )
        })
    }
}

/// The surfaces whose modules differ between two schemas.
pub(super) fn changed_alignments(old: &Schema, new: &Schema) -> Vec<String> {
    let of = |schema: &Schema, surface: &String| schema.alignment.get(surface).cloned();
    let all: BTreeSet<&String> = old.alignment.keys().chain(new.alignment.keys()).collect();
    all.into_iter().filter(|surface| of(old, surface) != of(new, surface)).cloned().collect()
}

#[cfg(test)]
mod tests;
