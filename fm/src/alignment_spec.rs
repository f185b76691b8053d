//! A surface's own alignment module, as its team declares it: what it reads beside the TAE, its
//! size, and the tasks that belong to the surface ("surface-specific features, tasks and
//! architectures", section 3.1.3). [`crate::alignment`] has the modules themselves.
//!
//! What a module reads stands in a target behind everything else: its categorical columns at the
//! end of `Target::ids`, its numeric ones at the end of `Target::features`. So the model reads what
//! it always read, and no column of a module reaches a token. Only trainers are shown them;
//! checkpoints and published weights are of a model without modules ([`FmSpec::served`]).

use std::borrow::Cow;

use hypercast_core::hash::mix_parts;
use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    batch::ColumnStatistics,
    example::{Example, Target},
    fields::{ABSENT, FieldColumn, FieldWidths},
    spec::{FmConfig, FmSpec, TaskSpec},
    training_only::{ReadFor, TrainingOnlyColumns},
};

/// The rows of a module's table of embeddings, in which all its categories share places. A module
/// helps to shape the TAE, and is no second store: two categories in one row cost little.
pub(crate) const TABLE_ROWS: usize = 4096;

/// The alignment module of a surface that has one of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentSpec {
    /// The widths of its hidden layers, in their order.
    pub hidden: Vec<usize>,
    /// The names of its numeric columns, in their order at the end of `Target::features`. Without
    /// them, it reads the columns of the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub features: Option<Vec<String>>,
    /// Its categorical features, in the order of their columns at the end of `Target::ids`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ids: Vec<AlignmentId>,
    /// The auxiliary tasks that belong to the surface, which no other module predicts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<String>,
    /// Which of its own columns serving would not know, as indices among them.
    #[serde(default, skip_serializing_if = "TrainingOnlyColumns::is_empty")]
    pub training_only: TrainingOnlyColumns,
}

/// A categorical feature of an alignment module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentId {
    /// Its name in the schema.
    pub name: String,
    /// The number of its columns, above 1 if it can have several values.
    pub columns: usize,
}

/// What the modules read of a batch's targets besides the TAE and the columns of the model, by
/// surface; nothing of surfaces without a module of their own.
#[derive(Debug, Clone, Default)]
pub struct AlignmentInputs {
    /// By surface, `[targets, numeric columns]`: standardised.
    pub(crate) features: Vec<Vec<f32>>,
    /// By surface, `[targets, categorical columns]`: rows of the module's table.
    pub(crate) ids: Vec<Vec<u32>>,
}

/// What a module reads of one target.
pub(crate) struct AlignmentRow {
    /// By column: the row of the module's table.
    pub(crate) ids: Vec<u32>,
    /// Not standardised.
    pub(crate) features: Vec<f32>,
}

impl AlignmentSpec {
    /// The number of its own numeric columns.
    pub fn feature_columns(&self) -> usize {
        self.features.as_ref().map_or(0, Vec::len)
    }

    /// The number of its categorical columns.
    pub fn id_columns(&self) -> usize {
        self.ids.iter().map(|id| id.columns).sum()
    }

    /// The fields of those.
    pub(crate) fn fields(&self) -> FieldWidths {
        FieldWidths::new(self.ids.iter().map(|id| id.columns))
    }

    /// What the module reads of a target of its surface, as `reader` sees it.
    pub(crate) fn read(&self, target: &Target, reader: ReadFor) -> AlignmentRow {
        let mut ids = target.ids[target.ids.len() - self.id_columns()..].to_vec();
        let mut features = self.features_of(target).to_vec();
        self.training_only.hide(&mut ids, &mut features, reader);
        let rows = self.fields().columns().into_iter().zip(ids);
        AlignmentRow { ids: rows.map(|(column, id)| table_row(column, id)).collect(), features }
    }

    /// Approximate memory of a target in a training pass, besides that of its token: what the
    /// module reads of its own and computes, and the gradients.
    pub(crate) fn bytes_per_target(&self, config: &FmConfig) -> usize {
        let embedded = (self.ids.len() + self.id_columns()) * config.embedding_dim;
        let hidden: usize = self.hidden.iter().sum();
        4 * 4 * (hidden + self.feature_columns() + embedded)
    }

    /// Its own numeric columns of a target.
    pub(crate) fn features_of<'a>(&self, target: &'a Target) -> &'a [f32] {
        &target.features[target.features.len() - self.feature_columns()..]
    }

    /// Whether the weights of a module of this kind are of use in one of another kind.
    pub(crate) fn has_inputs_and_size_of(&self, other: &AlignmentSpec) -> bool {
        let of =
            |spec: &AlignmentSpec| (spec.hidden.clone(), spec.features.clone(), spec.ids.clone());
        of(self) == of(other)
    }
}

impl AlignmentInputs {
    /// Of a batch without targets.
    pub(crate) fn new(spec: &FmSpec) -> AlignmentInputs {
        let count = if spec.alignments.is_empty() { 0 } else { spec.surfaces.len() };
        AlignmentInputs { features: vec![Vec::new(); count], ids: vec![Vec::new(); count] }
    }
}

/// The row of a category in the table of a module.
fn table_row(column: FieldColumn, id: u64) -> u32 {
    if column.is_of_several && id == 0 {
        return ABSENT;
    }
    (mix_parts(&[column.field as u64, id]) % TABLE_ROWS as u64) as u32
}

impl FmSpec {
    /// The surface's own alignment module; none if it has the usual one.
    pub fn alignment(&self, surface: u16) -> Option<&AlignmentSpec> {
        self.alignments.get(self.surfaces.get(usize::from(surface))?)
    }

    /// What of it a model is that serves: without alignment modules of surfaces' own, their inputs
    /// and their tasks.
    pub fn served(&self) -> FmSpec {
        let mut served = self.clone();
        served.tasks.retain(|task| !self.is_of_surface(task));
        served.alignments.clear();
        served
    }

    /// A trainer's example without what alignment modules alone read, as a model that serves is
    /// shown it.
    pub fn served_example<'a>(&self, example: &'a Example) -> Cow<'a, Example> {
        let Some(own) = self.alignment(example.surface) else { return Cow::Borrowed(example) };
        let mut served = example.clone();
        for target in &mut served.targets {
            target.features.truncate(self.features);
            target.ids.truncate(target.ids.len().saturating_sub(own.id_columns()));
        }
        Cow::Owned(served)
    }

    /// The tasks that the alignment module of a surface predicts, as indices among all.
    pub(crate) fn aligned_tasks(&self, surface: u16) -> Vec<usize> {
        let has_own = self.alignment(surface).is_some();
        let is_predicted = |&task: &usize| {
            let task = &self.tasks[task];
            // The usual module has an output for each task of the core, also of other surfaces'.
            if has_own { task.surfaces[usize::from(surface)] } else { !self.is_of_surface(task) }
        };
        (self.main_tasks().len()..self.tasks.len()).filter(is_predicted).collect()
    }

    /// Whether a column that only training knows is read of the targets of a surface.
    pub(crate) fn has_training_only(&self, surface: &str) -> bool {
        let own = self.alignments.get(surface).map(|own| &own.training_only);
        !self.training_only.is_empty() || own.is_some_and(|own| !own.is_empty())
    }

    /// Whether a task belongs to a surface.
    fn is_of_surface(&self, task: &TaskSpec) -> bool {
        self.alignments.values().any(|own| own.tasks.contains(&task.name))
    }

    /// Checks that alignment modules are of the surfaces and tasks that there are.
    pub(crate) fn validate_alignments(&self) -> Result<()> {
        for (surface, own) in &self.alignments {
            let fail = |why: &str| {
                Err(Error::Config(format!("the alignment module of surface {surface:?} {why}")))
            };
            let Some(at) = self.surfaces.iter().position(|name| name == surface) else {
                return fail("is of no surface that the data has");
            };
            let TrainingOnlyColumns { ids, numbers, missing } = &own.training_only;
            let is_known = ids.iter().all(|&column| column < own.id_columns())
                && numbers.iter().chain(missing).all(|&column| column < own.feature_columns());
            if own.hidden.is_empty() || own.hidden.contains(&0) || !is_known {
                return fail("has no hidden layer, or names a column that it does not read");
            }
            let is_own = |name: &String| {
                let mut tasks = self.auxiliary_tasks().iter();
                tasks.any(|task| {
                    let valid = task.surfaces.iter().enumerate().filter(|(_, valid)| **valid);
                    task.name == *name && valid.map(|(at, _)| at).eq([at])
                })
            };
            if !own.tasks.iter().all(is_own) {
                return fail("has a task that is not an auxiliary one of this surface alone");
            }
        }
        Ok(())
    }
}

impl ColumnStatistics {
    /// What of them is of a model that serves; `served` is its specification.
    pub(crate) fn served(mut self, served: &FmSpec) -> ColumnStatistics {
        self.labels.retain(|name, _| served.tasks.iter().any(|task| task.name == *name));
        self.alignments.clear();
        self
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::example::{Item, Outcome};

    #[test]
    fn a_module_reads_the_last_columns_and_no_prediction_what_only_training_knows() {
        let id = |name: &str| AlignmentId { name: name.into(), columns: 1 };
        let own = AlignmentSpec {
            hidden: vec![8],
            features: Some(["position", "words"].map(String::from).to_vec()),
            ids: vec![id("intent"), id("slot")],
            tasks: vec![],
            training_only: TrainingOnlyColumns { ids: vec![1], numbers: vec![0], missing: vec![] },
        };
        let target = |position: f32, slot: u64| Target {
            item: Arc::new(Item::default()),
            ids: vec![4, 5, 6, slot],
            features: vec![0.5, position, 3.0],
            outcome: Outcome::UNKNOWN,
            truth: vec![],
        };
        let read = |reader, slot| own.read(&target(slot as f32, slot), reader);
        let row = |field, id| table_row(FieldColumn { field, is_of_several: false }, id);
        let AlignmentRow { ids, features } = read(ReadFor::Learning, 7);
        assert_eq!((ids, features), (vec![row(0, 6), row(1, 7)], vec![7.0, 3.0]));
        let [one, other] = [7, 9].map(|slot| read(ReadFor::Prediction, slot));
        assert_eq!(one.ids, other.ids);
        assert!(one.features[0].is_nan() && one.features[1] == 3.0);
        assert!((0..500).all(|id| (row(3, id) as usize) < TABLE_ROWS));
        assert_ne!(row(0, 6), row(1, 6), "the same number of another feature is another category");
    }
}
