//! What the FM says of an expert's rows: embeddings, and its own predictions of the main tasks.
//!
//! A guest reads a prediction as log odds, or as the value of a regression. A network reads it on
//! the scale of its own output for the task of that name, so that a network whose output is this
//! column predicts what the FM does, whatever its own labels have said of base rates, means and
//! deviations so far. What the host corrects of a regression comes on top: it is learned of the
//! network's own predictions.

use std::sync::Arc;

use hypercast_data::schema::{Schema, TaskKind as SchemaTaskKind};
use hypercast_fm::inference::FmOutput;
use hypercast_fm::label_scale::{LabelScale, LabelScales, log_odds_of};

use super::normalise::Normaliser;
use super::params::Provenance;
use super::wasm::contract::TaskKind;

/// The target-aware embeddings of a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tae<'a> {
    /// `[rows, tae_dim]`, row-major, in the order of the examples' targets.
    Rows(&'a [f32]),
    /// Zeros, for the ablation "expert without TAE" or without a foundation model.
    Without,
}

/// The FM's answer for a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FmRows<'a> {
    /// The target-aware embeddings of all rows.
    pub tae: Tae<'a>,
    /// `[rows, main tasks]`, row-major, in the schema's order of main tasks: probabilities, or
    /// values in the unit of the label, and NaN for none. Empty where there are none at all.
    pub predictions: &'a [f32],
}

impl FmRows<'_> {
    /// Of a host that has no FM, or whose FM did not answer.
    pub const WITHOUT: FmRows<'static> = FmRows { tae: Tae::Without, predictions: &[] };

    /// The predictions of one of `tasks` main tasks for all rows; nothing if there are none, or
    /// not one a row and task, which only a record of another schema has.
    pub(crate) fn predictions_of(
        &self,
        task: usize,
        rows: usize,
        tasks: usize,
    ) -> impl Iterator<Item = f32> {
        let whole = Some(self.predictions).filter(|own| own.len() == rows * tasks);
        whole.unwrap_or_default().iter().skip(task).step_by(tasks).copied()
    }
}

/// Embeddings alone, for experts that read no prediction.
impl<'a> From<Tae<'a>> for FmRows<'a> {
    fn from(tae: Tae<'a>) -> Self {
        FmRows { tae, predictions: &[] }
    }
}

/// Of an FM whose main tasks are the schema's (see [`hypercast_data::schema::MainTasks`]).
impl<'a> From<&'a FmOutput> for FmRows<'a> {
    fn from(output: &'a FmOutput) -> Self {
        FmRows { tae: Tae::Rows(&output.tae), predictions: &output.main }
    }
}

/// How the numbers that a network reads are scaled.
#[derive(Debug, Clone, Copy)]
pub struct InputScales<'a> {
    /// The scales of numeric features.
    pub normaliser: &'a Normaliser,
    /// The scales of the network's outputs, and so of the FM's predictions for the same tasks.
    pub labels: &'a LabelScales,
}

/// Of a network whose outputs have no scales.
impl<'a> From<&'a Normaliser> for InputScales<'a> {
    fn from(normaliser: &'a Normaliser) -> Self {
        static NONE: LabelScales = LabelScales::new();
        InputScales { normaliser, labels: &NONE }
    }
}

impl<'a> From<&'a Provenance> for InputScales<'a> {
    fn from(Provenance { normaliser, labels, .. }: &'a Provenance) -> Self {
        InputScales { normaliser, labels }
    }
}

/// A task that the FM predicts.
#[derive(Debug, Clone)]
pub(crate) struct FmTask {
    pub(crate) name: String,
    kind: TaskKind,
}

impl FmTask {
    /// The main tasks of a schema, in the order of the FM's predictions.
    pub(crate) fn all(schema: &Schema) -> Arc<[FmTask]> {
        let kind = |kind| match kind {
            SchemaTaskKind::Binary => TaskKind::Binary,
            SchemaTaskKind::Regression => TaskKind::Regression,
        };
        let tasks = schema.main_tasks();
        tasks.map(|task| FmTask { name: task.name.clone(), kind: kind(task.kind) }).collect()
    }

    /// A prediction as guests read it: log odds, or the value of a regression; 0 for none.
    pub(crate) fn for_guest(&self, prediction: f32) -> f32 {
        match self.kind {
            TaskKind::Binary => log_odds_of(prediction),
            TaskKind::Regression if prediction.is_finite() => prediction,
            TaskKind::Regression => 0.0,
        }
    }

    /// A prediction as a network reads it, whose output for this task has `scale`: 0 for none,
    /// which is what such a network says that knows nothing.
    pub(crate) fn for_network(&self, scale: Option<&LabelScale>, prediction: f32) -> f32 {
        match (self.kind, scale) {
            (TaskKind::Binary, Some(scale @ LabelScale::Rate(_)))
            | (TaskKind::Regression, Some(scale @ LabelScale::Value(_))) => {
                scale.output(prediction)
            }
            _ => self.for_guest(prediction),
        }
    }
}

#[cfg(test)]
mod tests {
    use hypercast_fm::label_scale::LabelTransform;

    use super::*;

    #[test]
    fn a_network_reads_a_value_on_the_scale_of_its_output_and_a_guest_in_its_unit() {
        let task = |kind| FmTask { name: "watch".into(), kind };
        let mut scale = LabelScale::of_value(LabelTransform::Log);
        (0..900).for_each(|row| scale.observe((row % 90) as f32, 1.0));
        let seconds = task(TaskKind::Regression);
        assert_eq!(seconds.for_guest(33.0), 33.0);
        let output = seconds.for_network(Some(&scale), 33.0);
        assert!(output.abs() < 1.0 && (scale.prediction(output) - 33.0).abs() < 1e-3);
        // Of another kind, or bounded by the network itself.
        let rate = LabelScale::of_rate();
        for other in [Some(&rate), None] {
            assert_eq!(seconds.for_network(other, 33.0), 33.0);
        }
        let clicks = task(TaskKind::Binary);
        for other in [Some(&scale), None] {
            assert_eq!(clicks.for_network(other, 0.5), 0.0);
        }
        let nothing = [seconds.for_guest(f32::NAN), clicks.for_guest(f32::NAN)];
        assert_eq!(nothing, [0.0, 0.0]);
    }
}
