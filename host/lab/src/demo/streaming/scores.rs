//! How good served predictions were, by surface, task and arm: over the whole
//! run, and over the last lines. An arm is what answered: an expert's version, or the FM alone.
//!
//! A prediction counts once its outcome is known. Nothing is scored that was not served.

use std::collections::{BTreeMap, HashMap, VecDeque};

use hypercast_fm::metrics::{Keeper, Scored, cross_entropy};
use serde::Serialize;

use hypercast_data::dataset::Impression;
use hypercast_data::schema::{Schema, TaskKind, TaskRole};
use hypercast_serve::api::RankAnswer;
use hypercast_train::report::ALL;

/// Rows kept a slice.
const KEEP: usize = 1 << 20;

/// Lines that a window is over.
const WINDOW_LINES: usize = 4;

/// The arm of the true probabilities, in a simulated world.
const BEST: &str = "best possible";

/// Surface (the number of surfaces for all), task, arm.
type Slice = (usize, usize, String);

/// One surface, task and arm over the whole run.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// Name and version of the expert that answered, or `fm` where none did.
    pub arm: String,
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Area under the curve.
    pub auc: Option<f64>,
    /// AUC within users.
    pub gauc: Option<f64>,
    /// Rows.
    pub n: usize,
}

/// NE of a main task over all surfaces, for a line.
#[derive(Debug, Clone, PartialEq)]
pub struct Now {
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: String,
    /// Over the run so far.
    pub all: Option<f64>,
    /// Over the last lines.
    pub window: Option<f64>,
}

/// Served predictions, and what came of them.
#[derive(Debug)]
pub struct Scores<'a> {
    schema: &'a Schema,
    /// Binary tasks by index, with the bit of their label.
    tasks: Vec<(usize, usize)>,
    /// By request and item, what was served and by whom; until the outcome is known.
    served: HashMap<(u64, u64), (String, Vec<f32>)>,
    kept: Keeper<Slice>,
    sums: BTreeMap<(usize, String), Sums>,
}

#[derive(Debug, Default)]
struct Sums {
    all: Sum,
    lines: VecDeque<Sum>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    n: u64,
    positives: u64,
    entropy: f64,
}

impl Sum {
    fn add(self, other: Sum) -> Sum {
        Sum {
            n: self.n + other.n,
            positives: self.positives + other.positives,
            entropy: self.entropy + other.entropy,
        }
    }

    /// Eq. 5; none where all outcomes were alike.
    fn ne(self) -> Option<f64> {
        if self.positives == 0 || self.positives == self.n {
            return None;
        }
        let rate = self.positives as f64 / self.n as f64;
        let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
        Some(self.entropy / self.n as f64 / base)
    }
}

impl<'a> Scores<'a> {
    /// None yet.
    pub fn new(schema: &'a Schema) -> Self {
        let label = |(at, task): (usize, &hypercast_data::schema::Task)| {
            let bit = schema.action(&task.label).filter(|_| task.kind == TaskKind::Binary);
            bit.map(|bit| (at, bit))
        };
        Self {
            schema,
            tasks: schema.tasks.iter().enumerate().filter_map(label).collect(),
            served: HashMap::new(),
            kept: Keeper::new(KEEP),
            sums: BTreeMap::new(),
        }
    }

    /// Notes an answer until its outcomes are known.
    pub fn served(&mut self, answer: &RankAnswer) -> String {
        let arm = match (&answer.expert, answer.degraded) {
            (Some(expert), false) => expert.arm.clone(),
            _ => format!("fm@{}", answer.fm_version),
        };
        for ranked in &answer.ranking {
            let of = |task: &hypercast_data::schema::Task| {
                ranked.predictions.get(&task.name).copied().unwrap_or(f32::NAN)
            };
            let predictions = self.schema.tasks.iter().map(of).collect();
            self.served.insert((answer.request, ranked.id), (arm.clone(), predictions));
        }
        arm
    }

    /// Scores what was served of an impression.
    pub fn outcome(&mut self, request: u64, impression: &Impression) {
        let Some((arm, predictions)) = self.served.remove(&(request, impression.item)) else {
            return;
        };
        for &(task, bit) in &self.tasks.clone() {
            let outcome = &impression.outcome;
            if !self.schema.task_valid(task, impression.surface) || outcome.known >> bit & 1 == 0 {
                continue;
            }
            let label = outcome.actions >> bit & 1 == 1;
            let best = impression.truth.get(task).copied().unwrap_or(f32::NAN);
            for (arm, probability) in [(arm.as_str(), predictions[task]), (BEST, best)] {
                if probability.is_finite() {
                    let scored = Scored { user: impression.user, probability, label };
                    self.score((impression.surface.into(), task, arm), scored);
                }
            }
        }
    }

    fn score(&mut self, (surface, task, arm): (usize, usize, &str), scored: Scored) {
        for surface in [surface, self.schema.surfaces.len()] {
            self.kept.push((surface, task, arm.to_owned()), scored);
        }
        let one = Sum {
            n: 1,
            positives: u64::from(scored.label),
            entropy: cross_entropy(scored.probability, scored.label),
        };
        let sums = self.sums.entry((task, arm.to_owned())).or_default();
        sums.all = sums.all.add(one);
        match sums.lines.back_mut() {
            Some(last) => *last = last.add(one),
            None => sums.lines.push_back(one),
        }
    }

    /// The main tasks over all surfaces now. The next line begins.
    pub fn line(&mut self) -> Vec<Now> {
        let mut line = Vec::new();
        for ((task, arm), sums) in &mut self.sums {
            let window = sums.lines.iter().copied().fold(Sum::default(), Sum::add);
            sums.lines.push_back(Sum::default());
            if sums.lines.len() > WINDOW_LINES {
                sums.lines.pop_front();
            }
            let task = &self.schema.tasks[*task];
            if task.role == TaskRole::Main && arm != BEST {
                let (all, window) = (sums.all.ne(), window.ne());
                line.push(Now { task: task.name.clone(), arm: arm.clone(), all, window });
            }
        }
        line
    }

    /// Everything, those over all surfaces last.
    pub fn rows(&self) -> Vec<Row> {
        let row = |((surface, task, arm), summary): (&Slice, hypercast_fm::metrics::Summary)| Row {
            surface: self.schema.surfaces.get(*surface).map_or(ALL, String::as_str).to_owned(),
            task: self.schema.tasks[*task].name.clone(),
            arm: arm.clone(),
            ne: summary.ne,
            auc: summary.auc,
            gauc: summary.gauc,
            n: summary.n,
        };
        self.kept.summaries().map(row).collect()
    }
}
