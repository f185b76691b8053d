//! What an expert's `evaluate` is told of what may be published: predictions that were made before
//! their rows were learned from, and those of what serves on the same rows.
//!
//! Rows are labelled by the plugin itself, so its own tasks count as the schema's do. It decides
//! nothing.

use std::collections::VecDeque;

use hypercast_fm::{
    example::Example,
    metrics::{ScoredPrediction, binary_metrics},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::report::ALL;
use hypercast_expert::{
    Blueprint,
    train::TaskTargets,
    wasm::contract::{Decision, Evaluation, Quality, Slice, TaskKind, Verdict},
};

/// Rows that are kept; beyond them the oldest go.
const KEEP: usize = 1 << 16;

/// The newest rows, with predictions of what may be published and of what serves.
pub(super) struct EvalWindow {
    tasks: Vec<(String, TaskKind)>,
    surfaces: Vec<String>,
    pub(super) rows: VecDeque<WindowRow>,
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
    pub(super) fn new(blueprint: &Blueprint) -> Self {
        let tasks = blueprint.description.tasks.iter();
        Self {
            tasks: tasks.map(|task| (task.name.clone(), task.kind)).collect(),
            surfaces: blueprint.info.surfaces.clone(),
            rows: VecDeque::new(),
        }
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
            if self.rows.len() == KEEP {
                self.rows.pop_front();
            }
            self.rows.push_back(WindowRow {
                user: example.user.id,
                surface: example.surface,
                cells: (0..self.tasks.len()).map(cell).collect(),
            });
        }
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

/// The expert's own word; a plugin that fails holds what it was asked of.
pub(super) fn judge(blueprint: &Blueprint, evaluation: &Evaluation) -> Verdict {
    let said = blueprint.plugin.evaluate(&blueprint.info, evaluation);
    said.unwrap_or_else(|fault| Verdict::Hold(fault.to_string()))
}

/// The slices over all surfaces, in a line.
pub(super) fn line(evaluation: &Evaluation) -> Value {
    let slices = evaluation.slices.iter().filter(|slice| slice.surface.is_none());
    let slice = |slice: &Slice| {
        let serving = slice.serving.as_ref();
        json!({
            "surface": ALL, "task": slice.task, "n": slice.examples,
            "ne": slice.candidate.ne, "calibration": slice.candidate.calibration, "mse": slice.candidate.mse,
            "serving_ne": serving.and_then(|own| own.ne), "serving_mse": serving.and_then(|own| own.mse),
        })
    };
    slices.map(slice).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hypercast_fm::example::{Outcome, Target, User};

    use super::*;

    fn measured() -> EvalWindow {
        EvalWindow {
            tasks: vec![("click".into(), TaskKind::Binary), ("watch".into(), TaskKind::Regression)],
            surfaces: vec!["feed".into(), "search".into()],
            rows: VecDeque::new(),
        }
    }

    fn example(user: u64, surface: u16, targets: usize) -> Example {
        let target = Target {
            item: Arc::default(),
            ids: Vec::new(),
            features: Vec::new(),
            outcome: Outcome::UNKNOWN,
            truth: Vec::new(),
        };
        Example {
            request: 0,
            user: Arc::new(User { id: user, ..User::default() }),
            surface,
            time_ms: 0,
            history: Vec::new(),
            targets: vec![target; targets],
        }
    }

    fn targets(labels: &[f32], mask: &[bool]) -> TaskTargets {
        TaskTargets { labels: labels.to_vec(), mask: mask.to_vec(), weights: vec![1.0; mask.len()] }
    }

    #[test]
    fn both_are_measured_on_the_same_rows_by_task_and_surface() {
        let mut own = measured();
        let examples = [example(1, 0, 2), example(2, 1, 2)];
        let clicks = targets(&[1.0, 0.0, 1.0, 0.0], &[true; 4]);
        let watched = targets(&[2.0, 9.0, 4.0, 9.0], &[true, false, true, false]);
        let said = WindowPredictions {
            candidate: &[vec![0.5; 4], vec![2.0, 0.0, 3.0, 0.0]],
            serving: &[vec![0.9, 0.1, 0.9, 0.1], vec![0.0; 4]],
            targets: &[clicks, watched],
        };
        own.push(examples.iter(), said, |_| true);
        let evaluation = own.evaluation();
        let slice = |task: &str, surface: Option<&str>| {
            let mut all = evaluation.slices.iter();
            all.find(|own| own.task == task && own.surface.as_deref() == surface).unwrap()
        };
        assert_eq!(evaluation.slices.len(), 6);
        let click = slice("click", None);
        assert_eq!((click.examples, click.candidate.auc), (4, Some(0.5)));
        assert!((click.candidate.ne.unwrap() - 1.0).abs() < 1e-9);
        assert_eq!(click.candidate.calibration, Some(1.0));
        let serving = click.serving.as_ref().unwrap();
        assert!(
            (serving.ne.unwrap() + 0.9f64.ln() / 2f64.ln()).abs() < 1e-6
                && serving.auc == Some(1.0)
        );
        assert_eq!(slice("click", Some("search")).examples, 2);
        let watch = slice("watch", None);
        assert_eq!((watch.examples, watch.candidate.mse, watch.candidate.ne), (2, Some(0.5), None));
        assert_eq!(watch.serving.as_ref().unwrap().mse, Some(10.0));
        assert!((watch.candidate.calibration.unwrap() - 5.0 / 6.0).abs() < 1e-9);
        let line = line(&evaluation);
        assert_eq!(line.as_array().unwrap().len(), 2, "{line}");
    }

    #[test]
    fn rows_that_do_not_count_are_not_kept_and_old_ones_go() {
        let mut own = measured();
        let ones = vec![vec![0.5; 3], vec![0.5; 3]];
        let known = vec![targets(&[1.0; 3], &[true; 3]), targets(&[1.0; 3], &[true; 3])];
        let said = WindowPredictions { candidate: &ones, serving: &[], targets: &known };
        own.push([example(1, 0, 3)].iter(), said, |_| false);
        assert!(own.rows.is_empty() && own.evaluation().slices.is_empty());
        for user in 0..KEEP as u64 / 3 + 1 {
            own.push([example(user, 0, 3)].iter(), said, |_| true);
        }
        assert_eq!((own.rows.len(), own.rows[0].user), (KEEP, 0));
        let evaluation = own.evaluation();
        assert!(evaluation.slices.iter().all(|slice| slice.serving.is_none()));
    }
}
