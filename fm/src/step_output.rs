//! What a trainer says of the examples of a step.

use crate::{example::Example, inference::FmOutput, spec::FmSpec};

/// A step's predictions, which were made before it learned, with the labels.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// `[rows * tae_dim]`.
    pub tae: Vec<f32>,
    /// `[rows * tasks]`: probabilities, or values in the unit of the labels; NaN where the task is
    /// not valid on the row's surface.
    pub predictions: Vec<f32>,
    /// `[rows * tasks]`.
    pub labels: Vec<f32>,
    /// `[rows * tasks]`: whether the target is in the task's sample space.
    pub mask: Vec<bool>,
    /// The loss of eq. 3; 0 where nothing was learned.
    pub loss: f32,
    /// The examples that were not learned from, as they would have harmed the model, by index; the
    /// corrections' indices follow the examples'. Their predictions are NaN, their masks false.
    pub set_aside: Vec<usize>,
}

impl StepOutput {
    /// What serving would have answered before the step: the TAEs, and the predictions of the main
    /// tasks of `spec`.
    pub fn served(&self, spec: &FmSpec) -> FmOutput {
        let (mains, tasks) = (spec.main_tasks().len(), spec.tasks.len());
        let main = self.predictions.chunks_exact(tasks).flat_map(|row| &row[..mains]);
        FmOutput { main: main.copied().collect(), tae: self.tae.clone() }
    }

    /// Adds the rows of another part of the step's examples.
    pub(crate) fn append(&mut self, other: StepOutput) {
        self.tae.extend(other.tae);
        self.predictions.extend(other.predictions);
        self.labels.extend(other.labels);
        self.mask.extend(other.mask);
    }

    /// Gives the examples that were set aside rows as of a prediction that there is not.
    pub(crate) fn fill_gaps(&mut self, examples: &[&Example], [tae, tasks]: [usize; 2]) {
        let mut row = 0;
        let mut aside = self.set_aside.iter().peekable();
        for (at, example) in examples.iter().enumerate() {
            let rows = example.targets.len();
            if aside.next_if_eq(&&at).is_some() {
                let (taes, cells) = (row * tae, row * tasks);
                self.tae.splice(taes..taes, std::iter::repeat_n(0.0, rows * tae));
                let gap = || std::iter::repeat_n(f32::NAN, rows * tasks);
                self.predictions.splice(cells..cells, gap());
                self.labels.splice(cells..cells, gap());
                self.mask.splice(cells..cells, std::iter::repeat_n(false, rows * tasks));
            }
            row += rows;
        }
    }
}
