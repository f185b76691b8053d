//! What an expert's `evaluate` is told of what may be published: predictions that were made before
//! their rows were learned from, and those of what serves on the same rows.
//!
//! An expert's rows are labelled by the plugin itself, so its own tasks count as the schema's do.
//! The gate of the FM keeps its rows here, too. What the two have in common is the operator's
//! limits of NE, and that what is no better than the base rate is held. What NE is to a binary
//! task, the squared error over that of the mean is to a regression, but beside the base rate it
//! counts at most 1 ([`base_rate`]).

use std::collections::VecDeque;

use hypercast_fm::{
    base_rate,
    example::Example,
    metrics::{
        LogLossSums, RegressionMetrics, ScoredPrediction, ScoredValue, ValueSums, binary_metrics,
        regression_metrics,
    },
    spec::{FmSpec, TaskLabel},
    trainer::StepOutput,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::report::ALL;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::NeLimits;
use hypercast_data::schema::Schema;
use hypercast_expert::{
    train::TaskTargets,
    wasm::{
        ExpertFault,
        contract::{Decision, Evaluation, Quality, Slice, Task, TaskKind, Verdict},
    },
};

/// Rows of an expert that are kept; beyond them the oldest go.
const KEEP: usize = 1 << 16;

/// The fewest rows of either label, or of labels on either side of a regression's mean, for which
/// the error of a task is held against a limit.
const MIN_ROWS_OF_A_LABEL: u64 = 10;

/// The newest rows, with predictions of what may be published and of what serves.
pub(super) struct EvalWindow {
    tasks: Vec<(String, TaskKind)>,
    surfaces: Vec<String>,
    keep: usize,
    pub(super) rows: VecDeque<WindowRow>,
}

/// The error of a task over that of the base rate, on rows that have enough of either label: the
/// NE of a binary task, and of a regression the squared error over that of the rows' mean.
struct MeasuredError<'a> {
    task: &'a str,
    kind: TaskKind,
    candidate: f64,
    /// Of what serves, and of the candidate on the same rows, if what serves is known of enough
    /// rows.
    compared: Option<ComparedErrors>,
}

/// The errors of the candidate and of what serves, on the same rows.
#[derive(Clone, Copy)]
struct ComparedErrors {
    candidate: f64,
    serving: f64,
}

/// The predictions and labels of one target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct WindowRow {
    user: u64,
    surface: u16,
    /// A task each.
    cells: Vec<TaskCell>,
}

/// What was said of a task, and what came. Not a number where there is none.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct TaskCell {
    label: f32,
    candidate: f32,
    serving: f32,
}

impl PartialEq for TaskCell {
    /// By bits: what is missing equals what is missing.
    fn eq(&self, other: &TaskCell) -> bool {
        let bits = |own: &TaskCell| [own.label, own.candidate, own.serving].map(f32::to_bits);
        bits(self) == bits(other)
    }
}

/// What was said of the targets of some examples, `[rows]` a task.
#[derive(Clone, Copy)]
pub(super) struct WindowPredictions<'a> {
    /// By what may be published.
    pub(super) candidate: &'a [Vec<f32>],
    /// By what serves; empty where nothing does.
    pub(super) serving: &'a [Vec<f32>],
    /// What came.
    pub(super) targets: &'a [TaskTargets],
}

impl EvalWindow {
    /// For the tasks of an expert.
    pub(super) fn new(tasks: &[Task], schema: &Schema) -> Self {
        Self {
            tasks: tasks.iter().map(|task| (task.name.clone(), task.kind)).collect(),
            surfaces: schema.surfaces.clone(),
            keep: KEEP,
            rows: VecDeque::new(),
        }
    }

    /// For the main tasks of an FM, which alone are served.
    pub(super) fn of_fm(spec: &FmSpec, keep: usize) -> Self {
        let kind = |label| match label {
            TaskLabel::Action(_) => TaskKind::Binary,
            TaskLabel::Value(_) => TaskKind::Regression,
        };
        let tasks = spec.main_tasks().iter();
        Self {
            tasks: tasks.map(|task| (task.name.clone(), kind(task.label))).collect(),
            surfaces: spec.surfaces.clone(),
            keep,
            rows: VecDeque::new(),
        }
    }

    /// Puts back rows that were saved, the newest as far as they fit.
    pub(super) fn restore(&mut self, mut rows: VecDeque<WindowRow>) {
        rows.retain(|row| row.cells.len() == self.tasks.len());
        rows.drain(..rows.len().saturating_sub(self.keep));
        self.rows = rows;
    }

    /// Keeps the rows of the examples that are counted.
    pub(super) fn push<'a>(
        &mut self,
        examples: impl Iterator<Item = &'a Example>,
        said: WindowPredictions<'_>,
        counts: impl Fn(&Example) -> bool,
    ) {
        let targets = examples.flat_map(|own| own.targets.iter().map(move |_| own));
        for (at, example) in targets.enumerate().filter(|(_, example)| counts(example)) {
            let cell = |task: usize| TaskCell {
                label: match said.targets[task].mask[at] {
                    true => said.targets[task].labels[at],
                    false => f32::NAN,
                },
                candidate: said.candidate[task][at],
                serving: said.serving.get(task).map_or(f32::NAN, |own| own[at]),
            };
            if self.rows.len() == self.keep {
                self.rows.pop_front();
            }
            self.rows.push_back(WindowRow {
                user: example.user.id,
                surface: example.surface,
                cells: (0..self.tasks.len()).map(cell).collect(),
            });
        }
    }

    /// Keeps what an FM's trainer said of examples before it learned from them. The window is of
    /// its main tasks ([`EvalWindow::of_fm`]), which come first.
    pub(super) fn push_step(&mut self, examples: &[Example], said: &StepOutput) {
        let rows: usize = examples.iter().map(|example| example.targets.len()).sum();
        if rows == 0 || self.keep == 0 {
            return;
        }
        let width = said.predictions.len() / rows;
        let cells = |task: usize| (task..rows * width).step_by(width);
        let of_task = |task| TaskTargets {
            labels: cells(task).map(|cell| said.labels[cell]).collect(),
            mask: cells(task).map(|cell| said.mask[cell]).collect(),
            weights: vec![1.0; rows],
        };
        let tasks = 0..self.tasks.len();
        let targets: Vec<TaskTargets> = tasks.clone().map(of_task).collect();
        let candidate = |task| cells(task).map(|cell| said.predictions[cell]).collect();
        let candidate: Vec<Vec<f32>> = tasks.map(candidate).collect();
        let said = WindowPredictions { candidate: &candidate, serving: &[], targets: &targets };
        self.push(examples.iter(), said, |_| true);
    }

    /// The errors of the tasks, over all surfaces.
    fn measured_errors(&self) -> impl Iterator<Item = MeasuredError<'_>> {
        self.measured_errors_since(0, MIN_ROWS_OF_A_LABEL)
    }

    /// The same from a row on, of tasks that have at least `fewest` rows of either label.
    fn measured_errors_since(
        &self,
        first: usize,
        fewest: u64,
    ) -> impl Iterator<Item = MeasuredError<'_>> {
        self.tasks.iter().enumerate().filter_map(move |(task, (name, kind))| {
            let cells = || {
                let cells = self.rows.range(first..).map(move |row| row.cells[task]);
                cells.filter(|cell| !cell.label.is_nan())
            };
            let compared = || cells().filter(|cell| !cell.serving.is_nan());
            let error = |serving: bool| {
                relative_error(*kind, compared().map(|cell| cell.scored(serving)), fewest)
            };
            let of_both = |candidate, serving| ComparedErrors { candidate, serving };
            Some(MeasuredError {
                task: name,
                kind: *kind,
                candidate: relative_error(*kind, cells().map(|cell| cell.scored(false)), fewest)?,
                compared: error(false).zip(error(true)).map(|(own, serving)| of_both(own, serving)),
            })
        })
    }

    /// The mean over the tasks of their errors, as far as they count, over that of the base rate;
    /// none if no task has outcomes that differ.
    pub(super) fn mean_error(&self) -> Option<f64> {
        let errors = self.measured_errors_since(0, 1);
        let errors: Vec<f64> = errors.map(|own| own.counted(own.candidate)).collect();
        (!errors.is_empty()).then(|| errors.iter().sum::<f64>() / errors.len() as f64)
    }

    /// Says that an FM that may be published is no better than the base rate, and how to publish
    /// it nevertheless; `None` if it is better, or where too few rows say so.
    pub(super) fn above_base_rate(&self) -> Option<String> {
        let errors = self.measured_errors().map(|measured| measured.counted(measured.candidate));
        let why = base_rate::no_better(errors)?;
        Some(format!("{why} (`fm_gate.rows = 0` in hypercast.toml publishes everything)"))
    }

    /// Says that what may be published is no better than the base rate for the tasks that have no
    /// limit of the operator's, and how to publish it nevertheless. The newer half of the rows
    /// decides, since the first rows of all were predicted before anything was learned. What is
    /// better than what serves may replace it.
    fn worse_than_no_model(&self, limits: &NeLimits) -> Option<String> {
        let newer = || self.measured_errors_since(self.rows.len() / 2, base_rate::MIN_ROWS);
        let unlimited = || newer().filter(|measured| !limits.max.contains_key(measured.task));
        let gain = unlimited().filter_map(|measured| measured.gain()).reduce(|a, b| a + b)?;
        let errors = unlimited().map(|measured| measured.counted(measured.candidate));
        let why = base_rate::no_better(errors).filter(|_| base_rate::is_no_gain(gain))?;
        Some(format!("{why} (higher limits of its tasks in `ne_limits.max` would publish it)"))
    }

    /// Says which limits what may be published does not keep to; `None` if it keeps to all.
    pub(super) fn beyond(&self, limits: &NeLimits) -> Option<String> {
        let mut beyond = Vec::new();
        for MeasuredError { task, kind, candidate, compared } in self.measured_errors() {
            let is_binary = kind == TaskKind::Binary;
            let error = match kind {
                TaskKind::Binary => format!("NE of {task}"),
                TaskKind::Regression => format!("the squared error of {task} over the mean's"),
            };
            // A prediction that is not a number makes the error one that is below no limit.
            if let Some(&max) = limits.max.get(task)
                && (candidate.is_nan() || candidate > max)
            {
                beyond.push(format!("{error} is {candidate:.4}, above its limit of {max}"));
            }
            // Of a long tail, a few rows decide which of two squared errors is larger.
            if let (Some(increase), Some(ComparedErrors { candidate, serving })) =
                (limits.max_increase.filter(|_| is_binary), compared)
                && (candidate.is_nan() || candidate > serving * (1.0 + increase))
            {
                beyond.push(format!(
                    "NE of {task} is {candidate:.4}, {serving:.4} for what serves, which is more \
                     than the allowed {:.1} % worse",
                    increase * 100.0
                ));
            }
        }
        (!beyond.is_empty()).then(|| beyond.join("; "))
    }

    /// Refuses limits for a task that is not there.
    ///
    /// # Errors
    /// The first such task.
    pub(super) fn check_limits(&self, limits: &NeLimits) -> Result<()> {
        let is_there = |task: &&String| self.tasks.iter().any(|(name, _)| name == *task);
        let Some(task) = limits.max.keys().find(|task| !is_there(task)) else { return Ok(()) };
        let tasks: Vec<&String> = self.tasks.iter().map(|(name, _)| name).collect();
        Err(Error::invalid(format!("ne_limits.max.{task}: the expert has the tasks {tasks:?}")))
    }

    /// All of it, for the plugin.
    pub(super) fn evaluation(&self) -> Evaluation {
        let mut slices = Vec::new();
        for (task, (name, kind)) in self.tasks.iter().enumerate() {
            let surfaces = (0..self.surfaces.len() as u16).map(Some);
            for surface in std::iter::once(None).chain(surfaces) {
                let rows = || {
                    let here =
                        |row: &&WindowRow| surface.is_none_or(|surface| row.surface == surface);
                    let own = self.rows.iter().filter(here).map(|row| (row.user, row.cells[task]));
                    own.filter(|(_, cell)| !cell.label.is_nan())
                };
                let examples = rows().count();
                if examples == 0 {
                    continue;
                }
                // Where only some of the rows are known of what serves, the two are not of the same
                // rows.
                let compared = rows().all(|(_, cell)| !cell.serving.is_nan());
                let candidate = rows().map(|(user, cell)| (user, cell.candidate, cell.label));
                let serving = rows().map(|(user, cell)| (user, cell.serving, cell.label));
                slices.push(Slice {
                    task: name.clone(),
                    surface: surface.map(|at| self.surfaces[usize::from(at)].clone()),
                    examples: examples as u64,
                    candidate: quality(*kind, candidate),
                    serving: compared.then(|| quality(*kind, serving)),
                });
            }
        }
        Evaluation { decision: Decision::Publication, slices }
    }

    /// The slices over all surfaces, in a line for people.
    pub(super) fn line(&self) -> Value {
        let evaluation = self.evaluation();
        let slices = evaluation.slices.iter().filter(|slice| slice.surface.is_none());
        let slice = |slice: &Slice| {
            let serving = slice.serving.as_ref();
            let values = self.values_of(&slice.task);
            json!({
                "surface": ALL, "task": slice.task, "n": slice.examples,
                "ne": slice.candidate.ne, "calibration": slice.candidate.calibration,
                "mse": slice.candidate.mse, "base_mse": values.base_mse,
                "rank_correlation": values.rank_correlation,
                "serving_ne": serving.and_then(|own| own.ne),
                "serving_mse": serving.and_then(|own| own.mse),
            })
        };
        slices.map(slice).collect()
    }

    /// The metrics of the candidate for a regression; none of them of another task.
    fn values_of(&self, name: &str) -> RegressionMetrics {
        let is_own =
            |(own, kind): &(String, TaskKind)| own == name && *kind == TaskKind::Regression;
        let Some(task) = self.tasks.iter().position(is_own) else { return Default::default() };
        let cells = self.rows.iter().map(|row| row.cells[task]);
        let cells = cells.filter(|cell| !cell.label.is_nan());
        let rows = cells
            .map(|TaskCell { candidate, label, .. }| ScoredValue { prediction: candidate, label });
        regression_metrics(&rows.collect::<Vec<_>>())
    }
}

impl TaskCell {
    /// What serves said, or what may be published, with the label.
    fn scored(self, serving: bool) -> ScoredValue {
        let prediction = if serving { self.serving } else { self.candidate };
        ScoredValue { prediction, label: self.label }
    }
}

impl MeasuredError<'_> {
    /// One of its errors as far as it counts for what is held against the base rate.
    fn counted(&self, error: f64) -> f64 {
        match self.kind {
            TaskKind::Binary => error,
            TaskKind::Regression => base_rate::counted_ratio(error),
        }
    }

    /// How far the candidate's error is below that of what serves.
    fn gain(&self) -> Option<f64> {
        let ComparedErrors { candidate, serving } = self.compared?;
        Some(self.counted(serving) - self.counted(candidate))
    }
}

/// The error of some rows over that of the base rate, if at least `fewest` have either label, or
/// labels on either side of the mean.
fn relative_error(
    kind: TaskKind,
    rows: impl Iterator<Item = ScoredValue> + Clone,
    fewest: u64,
) -> Option<f64> {
    let (error, count, upper) = match kind {
        TaskKind::Binary => {
            let mut sums = LogLossSums::default();
            rows.for_each(|row| sums.push(row.prediction, row.label > 0.5));
            (sums.normalized_entropy()?, sums.count, sums.positives)
        }
        TaskKind::Regression => {
            let mut sums = ValueSums::default();
            rows.clone().for_each(|row| sums.push(row));
            let RegressionMetrics { mse, base_mse, .. } = sums.metrics();
            let mean = sums.label / sums.count as f64;
            let upper = rows.filter(|row| f64::from(row.label) > mean).count();
            (mse? / base_mse?, sums.count, upper as u64)
        }
    };
    (upper.min(count - upper) >= fewest).then_some(error)
}

/// Of rows of user, prediction and label.
fn quality(kind: TaskKind, rows: impl Iterator<Item = (u64, f32, f32)>) -> Quality {
    let rows: Vec<(u64, f32, f32)> = rows.collect();
    let sum = |value: fn(&(u64, f32, f32)) -> f32| {
        rows.iter().map(|row| f64::from(value(row))).sum::<f64>()
    };
    let came = sum(|row| row.2);
    let mut quality = Quality {
        ne: None,
        auc: None,
        gauc: None,
        calibration: (came != 0.0).then(|| sum(|row| row.1) / came),
        mse: None,
    };
    match kind {
        TaskKind::Binary => {
            let scored = |&(user, probability, label): &(u64, f32, f32)| ScoredPrediction {
                user,
                probability,
                label: label > 0.5,
            };
            let summary = binary_metrics(&rows.iter().map(scored).collect::<Vec<_>>());
            (quality.ne, quality.auc, quality.gauc) = (summary.ne, summary.auc, summary.gauc);
        }
        TaskKind::Regression => {
            quality.mse = Some(sum(|row| (row.1 - row.2).powi(2)) / rows.len() as f64);
        }
    }
    quality
}

/// The expert's own word, and where that publishes, the limits: the operator's, and the base rate
/// for tasks of which the operator says nothing, if something serves that would be replaced. A
/// plugin that fails holds what it was asked of.
pub(super) fn judge(
    said: std::result::Result<Verdict, ExpertFault>,
    measured: &EvalWindow,
    limits: &NeLimits,
    replaces: bool,
) -> Verdict {
    match said.unwrap_or_else(|fault| Verdict::Hold(fault.to_string())) {
        Verdict::Publish => {
            let worse = || measured.worse_than_no_model(limits).filter(|_| replaces);
            let beyond = measured.beyond(limits).or_else(worse);
            beyond.map_or(Verdict::Publish, Verdict::Hold)
        }
        held => held,
    }
}

#[cfg(test)]
mod tests;
