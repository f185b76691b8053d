//! The plugin's hooks in training: labels, sampling and the learning rate's schedule.

use std::ops::Range;

use hypercast_fm::example::Example;
use rand::Rng;
use rand::rngs::SmallRng;

use super::loss::TaskTargets;
use crate::wasm::contract::{self, ActionBatch, TaskLabels, TrainingStep};
use crate::{Blueprint, Error};

/// A request of a chunk, with its place in the chunk.
#[derive(Clone, Copy)]
pub(super) struct TrainingRequest<'a> {
    pub(super) example: &'a Example,
    pub(super) tae: &'a [f32],
    /// Its first row in the chunk's labels.
    pub(super) row: usize,
    /// Whether the trainer learns from any of its rows.
    pub(super) kept: bool,
}

impl TrainingRequest<'_> {
    /// Its rows in the chunk's labels.
    fn rows(&self) -> Range<usize> {
        self.row..self.row + self.example.targets.len()
    }
}

/// The hooks of a plugin for examples.
pub(super) struct Hooks<'a> {
    pub(super) blueprint: &'a Blueprint,
    /// Rows a call; a request is never split.
    pub(super) rows: usize,
}

impl Hooks<'_> {
    /// The labels of every row, for each task.
    pub(super) fn labels(&self, requests: &[TrainingRequest]) -> Result<Vec<TaskTargets>, Error> {
        let Blueprint { plugin, description, info, .. } = self.blueprint;
        let mut all = vec![TaskTargets::default(); description.tasks.len()];
        for part in self.parts(requests) {
            let labels = plugin.labels(description, info, &self.actions(part))?;
            for (all, part) in all.iter_mut().zip(labels) {
                all.append(part);
            }
        }
        Ok(all)
    }

    /// The labels to learn from. Rows that `sample` drops leave every task's sample space, and the
    /// kept rows have larger weights instead. Sets `kept` of each request.
    pub(super) fn sample(
        &self,
        requests: &mut [TrainingRequest],
        labels: &[TaskTargets],
        rng: &mut SmallRng,
    ) -> Result<Vec<TaskTargets>, Error> {
        let mut shares = Vec::new();
        for part in self.parts(requests) {
            let Blueprint { plugin, info, .. } = self.blueprint;
            shares.extend(plugin.sample(info, &self.actions(part))?);
        }
        let kept: Vec<bool> =
            shares.iter().map(|share| *share >= 1.0 || rng.random::<f32>() < *share).collect();
        let mut labels = labels.to_vec();
        for (row, (kept, share)) in kept.iter().zip(&shares).enumerate() {
            for task in &mut labels {
                if *kept {
                    task.weights[row] /= share;
                } else {
                    task.mask[row] = false;
                }
            }
        }
        for request in requests {
            request.kept = kept[request.rows()].contains(&true);
        }
        Ok(labels)
    }

    /// Splits requests into parts of at most `self.rows` rows, or of one request.
    fn parts<'r, 'a>(
        &self,
        requests: &'r [TrainingRequest<'a>],
    ) -> impl Iterator<Item = &'r [TrainingRequest<'a>]> + use<'r, 'a> {
        let (most, mut rows) = (self.rows, 0);
        requests.chunk_by(move |last, next| {
            rows += last.example.targets.len();
            let fits = rows + next.example.targets.len() <= most;
            rows = if fits { rows } else { 0 };
            fits
        })
    }

    fn actions(&self, requests: &[TrainingRequest]) -> ActionBatch {
        let examples = requests.iter().map(|request| request.example);
        contract::action_batch(examples, &self.blueprint.info)
    }
}

impl TaskTargets {
    fn append(&mut self, labels: TaskLabels) {
        self.labels.extend(labels.labels);
        self.mask.extend(labels.mask.iter().map(|mask| *mask != 0));
        // Without weights, each is 1.
        self.weights.extend(labels.weights);
        self.weights.resize(self.labels.len(), 1.0);
    }

    /// The rows of some requests of the chunk.
    pub(super) fn gather(&self, requests: &[TrainingRequest]) -> TaskTargets {
        let rows = || requests.iter().flat_map(TrainingRequest::rows);
        TaskTargets {
            labels: rows().map(|row| self.labels[row]).collect(),
            mask: rows().map(|row| self.mask[row]).collect(),
            weights: rows().map(|row| self.weights[row]).collect(),
        }
    }
}

/// Faults in a row after which `schedule` is not called any more: a plugin that never returns would
/// cost its deadline at every step.
const MAX_FAULTS_IN_A_ROW: u32 = 3;

/// Calls the plugin's `schedule` before each step. If that fails, the step uses the host's own
/// rate.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    /// The number of failed calls.
    pub(super) faults: u64,
    in_a_row: u32,
    /// The last fault as text.
    pub(super) last: Option<String>,
}

impl Schedule {
    /// The factor of this step's learning rates; 1 if the plugin fails.
    pub(super) fn factor(&mut self, blueprint: &Blueprint, step: TrainingStep) -> f32 {
        if self.in_a_row == MAX_FAULTS_IN_A_ROW {
            return 1.0;
        }
        match blueprint.plugin.schedule(step) {
            Ok(factor) => {
                self.in_a_row = 0;
                factor
            }
            Err(fault) => {
                self.faults += 1;
                self.in_a_row += 1;
                let fault = fault.to_string();
                if self.in_a_row == MAX_FAULTS_IN_A_ROW {
                    tracing::warn!(
                        "{fault}, {MAX_FAULTS_IN_A_ROW} times in a row: training continues without \
                         the plugin's schedule"
                    );
                } else if self.last.as_ref() != Some(&fault) {
                    tracing::warn!("{fault}: this step uses the host's own learning rate");
                }
                self.last = Some(fault);
                1.0
            }
        }
    }
}
