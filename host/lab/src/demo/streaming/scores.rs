//! Quality of served predictions by surface, task and arm: over the whole run, and over the last
//! status lines. The arm is what answered: an expert's version, or the FM by itself.
//!
//! A prediction counts once its outcome is known. Only served predictions are scored.

use std::collections::{BTreeMap, HashMap, VecDeque};

use hypercast_data::{
    dataset::Impression,
    schema::{Schema, Task, TaskKind, TaskRole},
};
use hypercast_fm::metrics::{MetricsWindow, ScoredPrediction};
use hypercast_serve::api::RankAnswer;

use crate::metrics::{LogLossSums, MetricRow, MetricSlice, metric_rows};

/// Rows kept per slice.
const KEEP: usize = 1 << 20;

/// Status lines per window.
const WINDOW_LINES: usize = 4;

/// The arm of the true probabilities, in a simulated world.
const BEST: &str = "best possible";

/// NE of a main task over all surfaces, for a status line.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskStatus {
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: String,
    /// NE over the run so far.
    pub all: Option<f64>,
    /// NE over the last lines.
    pub window: Option<f64>,
}

/// Served predictions and their outcomes.
#[derive(Debug)]
pub struct ServedScores<'a> {
    schema: &'a Schema,
    /// Binary tasks with the bit of their label.
    tasks: Vec<LabelledTask>,
    /// Served predictions by request and item, until the outcome is known.
    served: HashMap<(u64, u64), ServedPredictions>,
    kept: MetricsWindow<MetricSlice<String>>,
    /// By task and arm, over all surfaces.
    sums: BTreeMap<(usize, String), WindowedSums>,
}

#[derive(Debug, Clone, Copy)]
struct LabelledTask {
    task: usize,
    bit: usize,
}

#[derive(Debug)]
struct ServedPredictions {
    arm: String,
    /// By task of the schema; NaN where the answer has none.
    predictions: Vec<f32>,
}

#[derive(Debug, Default)]
struct WindowedSums {
    all: LogLossSums,
    lines: VecDeque<LogLossSums>,
}

impl<'a> ServedScores<'a> {
    /// No scores yet.
    pub fn new(schema: &'a Schema) -> Self {
        let labelled = |(task, spec): (usize, &Task)| {
            let bit = schema.action(&spec.label).filter(|_| spec.kind == TaskKind::Binary)?;
            Some(LabelledTask { task, bit })
        };
        Self {
            schema,
            tasks: schema.tasks.iter().enumerate().filter_map(labelled).collect(),
            served: HashMap::new(),
            kept: MetricsWindow::new(KEEP),
            sums: BTreeMap::new(),
        }
    }

    /// Keeps an answer until its outcomes are known; returns the arm that answered.
    pub fn serve(&mut self, answer: &RankAnswer) -> String {
        let arm = match (&answer.expert, answer.degraded) {
            (Some(expert), false) => expert.arm.clone(),
            _ => format!("fm@{}", answer.fm_version),
        };
        for ranked in &answer.ranking {
            let of = |task: &Task| ranked.predictions.get(&task.name).copied().unwrap_or(f32::NAN);
            let predictions = self.schema.tasks.iter().map(of).collect();
            let served = ServedPredictions { arm: arm.clone(), predictions };
            self.served.insert((answer.request, ranked.id), served);
        }
        arm
    }

    /// Scores the predictions that were served for an impression.
    pub fn score(&mut self, request: u64, impression: &Impression) {
        let Some(served) = self.served.remove(&(request, impression.item)) else { return };
        let outcome = &impression.outcome;
        for LabelledTask { task, bit } in self.tasks.clone() {
            if !self.schema.task_valid(task, impression.surface) || outcome.known >> bit & 1 == 0 {
                continue;
            }
            let (user, label) = (impression.user, outcome.actions >> bit & 1 == 1);
            let best = impression.truth.get(task).copied().unwrap_or(f32::NAN);
            for (arm, probability) in [(&*served.arm, served.predictions[task]), (BEST, best)] {
                if probability.is_finite() {
                    let surface = usize::from(impression.surface);
                    let slice = MetricSlice { surface, task, arm: arm.to_owned() };
                    self.push(slice, ScoredPrediction { user, probability, label });
                }
            }
        }
    }

    fn push(&mut self, slice: MetricSlice<String>, scored: ScoredPrediction) {
        let one = LogLossSums::of(scored.probability, scored.label);
        let sums = self.sums.entry((slice.task, slice.arm.clone())).or_default();
        sums.all += one;
        if sums.lines.is_empty() {
            sums.lines.push_back(LogLossSums::default());
        }
        *sums.lines.back_mut().expect("pushed above") += one;
        let all = MetricSlice { surface: self.schema.surfaces.len(), ..slice.clone() };
        self.kept.push(slice, scored);
        self.kept.push(all, scored);
    }

    /// The state of the main tasks. The next status line begins.
    pub fn next_line(&mut self) -> Vec<TaskStatus> {
        let mut line = Vec::new();
        for ((task, arm), sums) in &mut self.sums {
            let mut window = LogLossSums::default();
            sums.lines.iter().for_each(|sums| window += *sums);
            sums.lines.push_back(LogLossSums::default());
            if sums.lines.len() > WINDOW_LINES {
                sums.lines.pop_front();
            }
            let task = &self.schema.tasks[*task];
            if task.role == TaskRole::Main && arm != BEST {
                let (all, window) = (sums.all.normalized_entropy(), window.normalized_entropy());
                line.push(TaskStatus { task: task.name.clone(), arm: arm.clone(), all, window });
            }
        }
        line
    }

    /// The metrics of the whole run.
    pub fn rows(&self) -> Vec<MetricRow> {
        metric_rows(self.schema, &self.kept, String::clone)
    }
}
