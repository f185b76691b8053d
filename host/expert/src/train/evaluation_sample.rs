//! Rows for the hook `evaluate-rows`: some of the newest requests with the columns that the plugin
//! declares for its hooks, and with what was predicted of them before they were learned from.
//!
//! Requests are kept whole, those with the smallest hashes of their ids, as many as fit the budget.
//! So the sample depends neither on what they contain nor on when they come, within the rows that
//! an evaluation is of.

use std::collections::BTreeMap;

use hypercast_core::hash::mix64;

use super::chunk::Chunk;
use super::hooks::TrainingRequest;
use super::loss::TaskTargets;
use super::trainer::ExpertTrainer;
use crate::batch::GuestRequest;
use crate::wasm::ExpertFault;
use crate::wasm::contract::{
    ActionBatch, Data, Evaluation, EvaluationRows, NamedColumn, ScoredTask, Task, Verdict,
    WireColumn,
};
use crate::{Blueprint, Error};

/// The most bytes of a sample, one request alone excepted, as the host keeps it. The guest receives
/// all requests in one, which is less.
const MAX_SAMPLE_BYTES: usize = 4 << 20;

/// The share of a guest's memory that a sample may take, beside what the guest makes of it.
const MEMORY_SHARE: usize = 16;

/// What a list or a name takes beside long content: its header, and what the allocator adds.
const LIST_BYTES: usize = 48;

/// Rows after which a request leaves the sample, as it leaves what NE is measured on.
const NEWEST_ROWS: u64 = 1 << 16;

/// Makes the order of requests differ from other hashes of their ids.
const SAMPLE: u64 = 0x6576_616c_2d72_6f77;

/// The kind of the column that says of which request a row is.
const REQUEST: &str = "request";

/// What was predicted of the rows of some requests, `[rows]` a task.
#[derive(Debug, Clone, Copy)]
pub struct ScoredRows<'a> {
    /// By the parameters in training.
    pub candidate: &'a [Vec<f32>],
    /// By those that serve; empty where none do.
    pub serving: &'a [Vec<f32>],
    /// What the plugin's `labels` gave.
    pub targets: &'a [TaskTargets],
}

/// Whole requests with their predictions.
#[derive(Debug, Default)]
pub(crate) struct EvaluationSample {
    /// By the hash of their ids, and the row at which they came.
    kept: BTreeMap<(u64, u64), EvaluationRows>,
    bytes: usize,
    rows: u64,
    /// The first place for which there was no room.
    full_at: Option<(u64, u64)>,
}

impl EvaluationSample {
    /// Takes requests into account, whose rows are those of `scored` in order.
    fn push(&mut self, blueprint: &Blueprint, requests: &[GuestRequest], scored: ScoredRows) {
        let most = MAX_SAMPLE_BYTES.min(blueprint.plugin.memory_limit() / MEMORY_SHARE);
        let mut row = 0;
        for request in requests {
            let rows = row..row + request.example.targets.len();
            row = rows.end;
            let place = (mix64(request.example.request ^ SAMPLE), self.rows);
            self.rows += rows.len() as u64;
            if self.full_at.is_some_and(|full_at| place > full_at) {
                continue;
            }
            let tasks = &blueprint.description.tasks;
            let task = |(at, task): (usize, &Task)| scored.of_task(task, at, rows.clone());
            let own = EvaluationRows {
                request: vec![0; rows.len()],
                batch: blueprint.columns.hook_batch(&[*request], &blueprint.info),
                tasks: tasks.iter().enumerate().map(task).collect(),
            };
            self.bytes += bytes(&own);
            self.kept.insert(place, own);
            while self.bytes > most && self.kept.len() > 1 {
                let (place, gone) = self.kept.pop_last().expect("there are several");
                self.bytes -= bytes(&gone);
                self.full_at = Some(place);
            }
        }
        let oldest = self.rows.saturating_sub(NEWEST_ROWS);
        let old: Vec<(u64, u64)> =
            self.kept.keys().filter(|(_, row)| *row < oldest).copied().collect();
        for place in old {
            self.full_at = None;
            self.bytes -= self.kept.remove(&place).map_or(0, |gone| bytes(&gone));
        }
    }

    /// All requests in the order in which they came; `None` without any.
    pub(crate) fn rows(&self) -> Option<EvaluationRows> {
        let mut requests: Vec<(u64, &EvaluationRows)> =
            self.kept.iter().map(|((_, row), own)| (*row, own)).collect();
        requests.sort_by_key(|(row, _)| *row);
        let mut requests = requests.into_iter().map(|(_, own)| own);
        let mut all = requests.next()?.clone();
        (1..).zip(requests).for_each(|(at, own)| all.append(own, at));
        for task in &mut all.tasks {
            if task.serving.iter().all(|prediction| prediction.is_nan()) {
                task.serving.clear();
            }
        }
        Some(all)
    }
}

impl ScoredRows<'_> {
    fn of_task(&self, task: &Task, at: usize, rows: std::ops::Range<usize>) -> ScoredTask {
        let TaskTargets { labels, mask, .. } = &self.targets[at];
        let serving = self.serving.get(at).map(|own| own[rows.clone()].to_vec());
        ScoredTask {
            task: task.name.clone(),
            labels: labels[rows.clone()].to_vec(),
            mask: mask[rows.clone()].iter().map(|own| u8::from(*own)).collect(),
            candidate: self.candidate[at][rows.clone()].to_vec(),
            serving: serving.unwrap_or_else(|| vec![f32::NAN; rows.len()]),
        }
    }
}

impl EvaluationRows {
    /// Adds the rows of request `at`.
    fn append(&mut self, other: &EvaluationRows, at: u32) {
        self.request.extend(other.request.iter().map(|_| at));
        let (batch, more) = (&mut self.batch, &other.batch);
        batch.surface.extend(&more.surface);
        batch.actions.extend(&more.actions);
        batch.known.extend(&more.known);
        for (values, more) in batch.values.iter_mut().zip(&more.values) {
            values.values.extend(&more.values);
        }
        for (NamedColumn { column, data }, more) in batch.columns.iter_mut().zip(&more.columns) {
            match (data, &more.data) {
                (Data::Numbers(all), Data::Numbers(more)) => all.extend(more),
                (Data::Ids(all), Data::Ids(more)) => all.extend(more),
                (Data::Integers(all), Data::Integers(more)) if is_request(column) => {
                    all.extend(more.iter().map(|_| i64::from(at)));
                }
                (Data::Integers(all), Data::Integers(more)) => all.extend(more),
                _ => unreachable!("a column has one type"),
            }
        }
        for (task, more) in self.tasks.iter_mut().zip(&other.tasks) {
            task.labels.extend(&more.labels);
            task.mask.extend(&more.mask);
            task.candidate.extend(&more.candidate);
            task.serving.extend(&more.serving);
        }
    }
}

fn is_request(WireColumn { kind, .. }: &WireColumn) -> bool {
    kind == REQUEST
}

/// The memory that some rows take.
pub(crate) fn bytes(EvaluationRows { request, batch, tasks }: &EvaluationRows) -> usize {
    let ActionBatch { surface, actions, known, values, columns } = batch;
    let outcomes = 4 * (request.len() + surface.len()) + 8 * (actions.len() + known.len());
    let (batch_values, batch_columns) = (values.len(), columns.len());
    let values: usize = values.iter().map(|own| 4 * own.values.len()).sum();
    let column = |own: &NamedColumn| match &own.data {
        Data::Numbers(numbers) => 4 * numbers.len(),
        Data::Ids(ids) => 8 * ids.len(),
        Data::Integers(integers) => 8 * integers.len(),
    };
    let columns: usize = columns.iter().map(column).sum();
    let task = |own: &ScoredTask| {
        own.mask.len() + 4 * (own.labels.len() + own.candidate.len() + own.serving.len())
    };
    // Their own lists and names, and those of each value, column and task.
    let lists = 7 + 2 * batch_values + 3 * batch_columns + 5 * tasks.len();
    let tasks: usize = tasks.iter().map(task).sum();
    outcomes + values + columns + tasks + lists * LIST_BYTES
}

impl ExpertTrainer {
    /// Keeps some of a chunk's requests with what was predicted of them, for [`Self::judge`].
    /// Progressive training does so itself.
    ///
    /// # Errors
    /// What the FM says of the chunk does not fit.
    pub fn sample(&mut self, chunk: Chunk, scored: ScoredRows) -> Result<(), Error> {
        if self.blueprint.plugin.evaluates_rows() {
            let requests = self.requests(chunk)?;
            self.sample_requests(&requests, scored);
        }
        Ok(())
    }

    pub(super) fn sample_requests(&mut self, requests: &[TrainingRequest], scored: ScoredRows) {
        if !self.blueprint.plugin.evaluates_rows() || scored.candidate.is_empty() {
            return;
        }
        let requests: Vec<_> = requests.iter().map(TrainingRequest::of_guest).collect();
        let mut serving = scored.serving.to_vec();
        if let Some(own) = &self.serving {
            let learned = |request: &GuestRequest| {
                let is_learned = request.example.time_ms <= own.learned_until_ms;
                std::iter::repeat_n(is_learned, request.example.targets.len())
            };
            let learned: Vec<bool> = requests.iter().flat_map(learned).collect();
            for task in &mut serving {
                let rows = task.iter_mut().zip(&learned).filter(|(_, learned)| **learned);
                rows.for_each(|(prediction, _)| *prediction = f32::NAN);
            }
        }
        let scored = ScoredRows { serving: &serving, ..scored };
        self.sample.push(&self.blueprint, &requests, scored);
    }

    /// What the plugin's `validation-score` makes of predictions for a chunk, of which it gets a
    /// sample as `evaluate-rows` does; none if the plugin leaves it to its caller.
    ///
    /// # Errors
    /// What the FM says of the chunk does not fit, or the plugin faults.
    pub fn validation_score(
        &self,
        evaluation: &Evaluation,
        chunk: Chunk,
        scored: ScoredRows,
    ) -> Result<Option<f64>, Error> {
        let Blueprint { plugin, info, .. } = &*self.blueprint;
        if !plugin.scores_passes() {
            return Ok(None);
        }
        let requests = self.requests(chunk)?;
        let requests: Vec<_> = requests.iter().map(TrainingRequest::of_guest).collect();
        let mut sample = EvaluationSample::default();
        sample.push(&self.blueprint, &requests, scored);
        let Some(rows) = sample.rows() else { return Ok(None) };
        Ok(plugin.validation_score(info, evaluation, &rows)?)
    }

    /// Forgets what was kept: it was predicted by other parameters than those that are judged next.
    pub fn forget_sample(&mut self) {
        self.sample = EvaluationSample::default();
    }

    /// The plugin's verdict on the parameters: of its `evaluate-rows` if it has that and requests
    /// were kept, and of `evaluate` if not.
    ///
    /// # Errors
    /// The plugin faults.
    pub fn judge(&self, evaluation: &Evaluation) -> Result<Verdict, ExpertFault> {
        let Blueprint { plugin, info, .. } = &*self.blueprint;
        match self.sample.rows() {
            Some(rows) => plugin.evaluate_rows(info, evaluation, &rows),
            None => plugin.evaluate(info, evaluation),
        }
    }
}
