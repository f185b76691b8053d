//! The plugin's hooks in training: labels, weights, sampling and the learning rate's schedule.

use std::ops::Range;

use hypercast_data::ranked_place::RankedPlace;
use hypercast_fm::example::Example;
use rand::Rng;
use rand::rngs::SmallRng;

use super::loss::TaskTargets;
use crate::batch::GuestRequest;
use crate::fm_rows::{FmRows, Tae};
use crate::wasm::ExpertFault;
use crate::wasm::contract::{ActionBatch, TaskLabels, TrainingStep};
use crate::{Blueprint, Error};

/// A request of a chunk, with its place in the chunk.
#[derive(Clone, Copy)]
pub(super) struct TrainingRequest<'a> {
    pub(super) example: &'a Example,
    pub(super) tae: &'a [f32],
    /// The FM's; empty where the expert reads none.
    pub(super) predictions: &'a [f32],
    /// Where its rows were ranked; empty if nothing is known of any.
    pub(super) ranked: &'a [Option<RankedPlace>],
    /// Its index among the chunk's examples.
    pub(super) index: usize,
    /// Its first row in the chunk's labels.
    pub(super) row: usize,
    /// Whether the trainer learns from any of its rows.
    pub(super) kept: bool,
}

impl TrainingRequest<'_> {
    fn refused(&self, fault: &ExpertFault) -> RefusedRequest {
        RefusedRequest { index: self.index, reason: fault.to_string() }
    }

    pub(super) fn of_guest(&self) -> GuestRequest<'_> {
        let tae = if self.tae.is_empty() { Tae::Without } else { Tae::Rows(self.tae) };
        let fm = FmRows { tae, predictions: self.predictions };
        GuestRequest { example: self.example, fm, ranked: self.ranked }
    }

    /// Its rows in the chunk's labels.
    fn rows(&self) -> Range<usize> {
        self.row..self.row + self.example.targets.len()
    }
}

/// The hooks of a plugin for examples.
pub(super) struct Hooks<'a> {
    blueprint: &'a Blueprint,
    /// Rows a call; a request is never split.
    rows: usize,
}

/// The most bytes of columns that a call is sent besides the outcomes, one request alone excepted.
/// A guest has them in its memory, beside what it makes of them.
const MAX_COLUMN_BYTES: usize = 8 << 20;

/// A request that the trainer does not learn from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedRequest {
    /// Its index among the chunk's examples.
    pub index: usize,
    /// Why.
    pub reason: String,
}

/// What a hook gave for some requests.
struct HookAnswer<'r, 'a, T> {
    requests: &'r [TrainingRequest<'a>],
    /// A fault is that of one request.
    answer: Result<T, ExpertFault>,
}

/// Requests for which a hook faults, and for no other so far, until the fault is the plugin's own:
/// one that never returns would cost its deadline for every request.
const MAX_REFUSED: usize = 8;

impl<'b> Hooks<'b> {
    /// Those of a plugin, which are called for `rows` rows, or fewer if their columns are wide.
    pub(super) fn new(blueprint: &'b Blueprint, rows: usize) -> Hooks<'b> {
        let most = MAX_COLUMN_BYTES / blueprint.columns.hook_row_bytes().max(1);
        Hooks { blueprint, rows: rows.min(most) }
    }

    /// The labels of every row, for each task. A request for which the plugin faults is refused:
    /// its rows are in no sample space.
    ///
    /// # Errors
    /// The plugin faults for all of several requests.
    pub(super) fn labels(
        &self,
        requests: &[TrainingRequest],
        refused: &mut Vec<RefusedRequest>,
    ) -> Result<Vec<TaskTargets>, Error> {
        let Blueprint { plugin, description, info, .. } = self.blueprint;
        let mut all = vec![TaskTargets::default(); description.tasks.len()];
        let answers = self.call(requests, |batch| plugin.labels(description, info, batch))?;
        for HookAnswer { requests, answer } in answers {
            match answer {
                Ok(labels) => {
                    all.iter_mut().zip(labels).for_each(|(all, part)| all.append(part));
                }
                Err(fault) => {
                    let rows = requests[0].example.targets.len();
                    all.iter_mut().for_each(|all| all.append_unlabelled(rows));
                    refused.push(requests[0].refused(&fault));
                }
            }
        }
        if plugin.weighs() {
            self.weigh(requests, &mut all, refused)?;
        }
        Ok(all)
    }

    /// Multiplies the weights of labels by those of the plugin's `weights`. A request for which
    /// that faults is refused, too.
    fn weigh(
        &self,
        requests: &[TrainingRequest],
        all: &mut [TaskTargets],
        refused: &mut Vec<RefusedRequest>,
    ) -> Result<(), Error> {
        let Blueprint { plugin, description, info, .. } = self.blueprint;
        let is_refused =
            |request: &TrainingRequest| refused.iter().any(|own| own.index == request.index);
        let labelled: Vec<TrainingRequest> =
            requests.iter().filter(|request| !is_refused(request)).copied().collect();
        let answers = self.call(&labelled, |batch| plugin.weights(description, info, batch))?;
        for HookAnswer { requests, answer } in answers {
            let rows = || requests.iter().flat_map(TrainingRequest::rows);
            match answer {
                Ok(weights) => {
                    for (task, weights) in all.iter_mut().zip(weights) {
                        for (row, weight) in rows().zip(weights) {
                            task.weights[row] *= weight;
                        }
                    }
                }
                Err(fault) => {
                    for task in &mut *all {
                        rows().for_each(|row| task.mask[row] = false);
                    }
                    refused.push(requests[0].refused(&fault));
                }
            }
        }
        Ok(())
    }

    /// Calls a hook for all requests, in parts. Where it faults, it is called for each request of
    /// the part alone, so that one odd request does not end the training, again at each start.
    fn call<'r, 'a, T>(
        &self,
        requests: &'r [TrainingRequest<'a>],
        hook: impl Fn(&ActionBatch) -> Result<T, ExpertFault>,
    ) -> Result<Vec<HookAnswer<'r, 'a, T>>, Error> {
        let mut answers: Vec<HookAnswer<'r, 'a, T>> = Vec::new();
        for part in self.parts(requests) {
            let answer = hook(&self.actions(part));
            if answer.is_ok() || part.len() == 1 {
                answers.push(HookAnswer { requests: part, answer });
                continue;
            }
            let mut faults = 0;
            for requests in part.chunks(1) {
                let answer = hook(&self.actions(requests));
                faults += usize::from(answer.is_err());
                answers.push(HookAnswer { requests, answer });
                let is_enough = faults == part.len().min(MAX_REFUSED);
                if is_enough && answers.iter().all(|own| own.answer.is_err()) {
                    let last = answers.pop().and_then(|own| own.answer.err());
                    return Err(last.expect("all are faults").into());
                }
            }
        }
        Ok(answers)
    }

    /// The labels to learn from. Rows that `sample` drops leave every task's sample space, and the
    /// kept rows have larger weights instead. Sets `kept` of each request; one for which the plugin
    /// faults is refused and not kept.
    ///
    /// # Errors
    /// As [`Hooks::labels`].
    pub(super) fn sample(
        &self,
        requests: &mut [TrainingRequest],
        labels: &[TaskTargets],
        rng: &mut SmallRng,
        refused: &mut Vec<RefusedRequest>,
    ) -> Result<Vec<TaskTargets>, Error> {
        let Blueprint { plugin, info, .. } = self.blueprint;
        let mut shares = Vec::new();
        for HookAnswer { requests, answer } in
            self.call(requests, |batch| plugin.sample(info, batch))?
        {
            match answer {
                Ok(own) => shares.extend(own),
                Err(fault) => {
                    shares.extend(vec![0.0; requests[0].example.targets.len()]);
                    refused.push(requests[0].refused(&fault));
                }
            }
        }
        let mut labels = labels.to_vec();
        let mut shares = shares.into_iter();
        for request in requests {
            request.kept = false;
            for (row, share) in request.rows().zip(shares.by_ref()) {
                let kept = share >= 1.0 || rng.random::<f32>() < share;
                request.kept |= kept;
                for task in &mut labels {
                    if kept {
                        task.weights[row] /= share;
                    } else {
                        task.mask[row] = false;
                    }
                }
            }
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
        let Blueprint { columns, info, .. } = self.blueprint;
        let requests: Vec<_> = requests.iter().map(TrainingRequest::of_guest).collect();
        columns.hook_batch(&requests, info)
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

    /// Rows in no sample space.
    fn append_unlabelled(&mut self, rows: usize) {
        let all = self.labels.len() + rows;
        self.labels.resize(all, 0.0);
        self.mask.resize(all, false);
        self.weights.resize(all, 1.0);
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
