//! Quality of served predictions by surface, task and arm: over the whole run, and over the last
//! status lines. The arm is what answered: an expert's version, or the FM by itself.
//!
//! A prediction counts once its outcome is known. Only served predictions are scored.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use hypercast_data::{
    dataset::Impression,
    schema::{BinaryLabels, Schema, Task, TaskKind, TaskRole},
};
use hypercast_serve::api::RankAnswer;

use crate::metrics::{LogLossSums, MetricRow, ScoredPrediction, ScoredValue, SlicedPredictions};

/// Rows kept per slice.
const KEEP: usize = 1 << 20;

/// Status lines per window.
const WINDOW_LINES: usize = 4;

/// The arm of the true probabilities, in a simulated world.
const BEST: &str = "best possible";

/// Served predictions and their outcomes.
#[derive(Debug)]
pub struct ServedScores {
    labels: BinaryLabels,
    /// Served predictions by request and item, until the outcome is known.
    served: HashMap<(u64, u64), ServedPredictions>,
    kept: SlicedPredictions<String>,
    /// By task and arm, over all surfaces.
    sums: BTreeMap<(usize, String), WindowedSums>,
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
    /// Since the last status line, and of those before.
    line: LogLossSums,
    lines: VecDeque<LogLossSums>,
}

impl ServedScores {
    /// Scores before the first prediction.
    pub fn new(schema: &Arc<Schema>) -> Self {
        Self {
            labels: BinaryLabels::new(schema),
            served: HashMap::new(),
            kept: SlicedPredictions::new(schema, KEEP),
            sums: BTreeMap::new(),
        }
    }

    /// Keeps an answer until its outcomes are known; returns the arm that answered.
    pub fn serve(&mut self, answer: &RankAnswer) -> String {
        let arm = match (&answer.expert, answer.degraded) {
            (Some(expert), false) => expert.arm.clone(),
            _ => format!("fm@{}", answer.fm_version),
        };
        for (place, id) in answer.ranking.ids.iter().enumerate() {
            let of = |task: &Task| {
                answer.ranking.predictions.get(&task.name).map_or(f32::NAN, |all| all[place])
            };
            let predictions = self.labels.schema.tasks.iter().map(of).collect();
            let served = ServedPredictions { arm: arm.clone(), predictions };
            self.served.insert((answer.request, id.key()), served);
        }
        arm
    }

    /// Scores the predictions that were served for an impression.
    pub fn score(&mut self, request: u64, impression: &Impression) {
        let Some(served) = self.served.remove(&(request, impression.item)) else { return };
        let Impression { surface, user, outcome, .. } = impression;
        let schema = &self.labels.schema;
        for task in
            (0..schema.tasks.len()).filter(|&task| schema.tasks[task].kind == TaskKind::Regression)
        {
            let (prediction, label) =
                (served.predictions[task], schema.label(task, *surface, outcome));
            if let Some(label) = label.filter(|_| prediction.is_finite()) {
                self.kept.push_value(
                    *surface,
                    task,
                    &served.arm,
                    ScoredValue { prediction, label },
                );
            }
        }
        for task in self.labels.tasks() {
            let Some(label) = self.labels.of_outcome(outcome, *surface, task) else { continue };
            let best = impression.truth.get(task).copied().unwrap_or(f32::NAN);
            for (arm, probability) in [(&*served.arm, served.predictions[task]), (BEST, best)] {
                if probability.is_finite() {
                    let arm = arm.to_owned();
                    let scored = ScoredPrediction { user: *user, probability, label };
                    self.kept.push(*surface, task, &arm, scored);
                    let sums = self.sums.entry((task, arm)).or_default();
                    sums.all += LogLossSums::of(probability, label);
                    sums.line += LogLossSums::of(probability, label);
                }
            }
        }
    }

    /// NE of the main tasks over all surfaces, over the run so far and over the last status lines:
    /// a line per task with its arms. The next status line begins.
    pub fn next_line(&mut self) -> String {
        let (mut text, mut last) = (String::new(), "");
        let number = |sums: LogLossSums| {
            sums.normalized_entropy().map_or("–".into(), |ne| format!("{ne:.4}"))
        };
        for ((task, arm), sums) in &mut self.sums {
            sums.lines.push_back(std::mem::take(&mut sums.line));
            if sums.lines.len() > WINDOW_LINES {
                sums.lines.pop_front();
            }
            let mut window = LogLossSums::default();
            sums.lines.iter().for_each(|sums| window += *sums);
            let task = &self.labels.schema.tasks[*task];
            if task.role == TaskRole::Main && arm != BEST {
                if task.name != last {
                    text += &format!("\n    NE {:<12}", task.name);
                    last = &task.name;
                }
                text += &format!(" {arm} {} (now {})", number(sums.all), number(window));
            }
        }
        text
    }

    /// The metrics of the whole run.
    pub fn rows(&self) -> Vec<MetricRow> {
        self.kept.rows(String::clone)
    }
}
