//! Sums of log loss by user, for NE and its interval: a replicate of the bootstrap needs only a
//! user's sums, not the rows.

use std::collections::BTreeMap;

use hypercast_data::schema::BinaryLabels;
use hypercast_fm::{example::Example, metrics::log_loss};

use crate::{
    error::{CommonErrors as _, Error, Result},
    metrics::normalized_entropy,
};

/// The sums of a user's rows, by arm.
#[derive(Debug, Clone, PartialEq)]
struct UserSums {
    rows: Vec<u32>,
    positives: u32,
    nats: Vec<f64>,
}

/// A surface and a task, as indices of the schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SurfaceTask {
    /// The surface; the number of surfaces stands for all of them.
    pub surface: usize,
    /// The task.
    pub task: usize,
}

/// A label, with the index of the arm that predicted it.
#[derive(Debug, Clone, Copy)]
pub struct TalliedLabel {
    /// The arm.
    pub arm: usize,
    /// The user.
    pub user: u64,
    /// Index of the surface.
    pub surface: u16,
    /// Index of the task in the schema.
    pub task: usize,
    /// Whether it happened.
    pub label: bool,
}

/// One seed's sums, by surface and task.
#[derive(Debug, Clone)]
pub struct ScoreTally {
    labels: BinaryLabels,
    from_ms: i64,
    /// The arms' names.
    pub arms: Vec<String>,
    slices: BTreeMap<SurfaceTask, BTreeMap<u64, UserSums>>,
}

impl ScoreTally {
    /// Empty sums for some arms; the first is the baseline. Rows before `from_ms` are ignored.
    pub fn new(labels: &BinaryLabels, from_ms: i64, arms: &[&str]) -> Self {
        let arms = arms.iter().map(|arm| arm.to_string()).collect();
        Self { labels: labels.clone(), from_ms, arms, slices: BTreeMap::new() }
    }

    /// The label of an example's target `row` for a task of the schema, if it counts: in the time
    /// of the tally, and in the task's sample space.
    pub fn label(&self, example: &Example, row: usize, task: usize) -> Option<bool> {
        let label = self.labels.label(example, row, task);
        label.filter(|_| example.time_ms >= self.from_ms)
    }

    /// Adds a prediction for a label; one that is NaN is ignored.
    pub fn add(&mut self, of: TalliedLabel, probability: f32) {
        let TalliedLabel { arm, user, surface, task, label } = of;
        if probability.is_nan() {
            return;
        }
        let nats = log_loss(probability, label);
        let arms = self.arms.len();
        for surface in [usize::from(surface), self.labels.schema.surfaces.len()] {
            let users = self.slices.entry(SurfaceTask { surface, task }).or_default();
            let sums = users.entry(user).or_insert_with(|| UserSums {
                rows: vec![0; arms],
                positives: 0,
                nats: vec![0.0; arms],
            });
            sums.rows[arm] += 1;
            sums.nats[arm] += nats;
            // The arms see the same rows; one of them counts the labels.
            sums.positives += u32::from(label && arm == 0);
        }
    }

    /// The slices that every arm predicts.
    ///
    /// # Errors
    /// Arms that predicted different rows, which cannot be compared.
    pub fn slices(&self) -> Result<Vec<SurfaceTask>> {
        let mut all = Vec::new();
        for (slice, users) in &self.slices {
            let rows =
                |arm: usize| users.values().map(|sums| u64::from(sums.rows[arm])).sum::<u64>();
            let counts: Vec<u64> = (0..self.arms.len()).map(rows).collect();
            if counts.contains(&0) {
                continue;
            }
            if users.values().any(|sums| sums.rows.iter().any(|rows| *rows != sums.rows[0])) {
                let task = &self.labels.schema.tasks[slice.task].name;
                return Err(Error::internal(format!(
                    "task {task:?}: the arms {:?} predicted {counts:?} rows, and not the same ones",
                    self.arms
                )));
            }
            all.push(*slice);
        }
        Ok(all)
    }
}

/// The sums of one slice by user, laid out for resampling.
#[derive(Debug, Clone, PartialEq)]
pub struct UserTotals {
    /// Rows per user.
    pub rows: Vec<f64>,
    /// Positives per user.
    pub positives: Vec<f64>,
    /// Log loss by `[seeds][arms][users]`.
    pub nats: Vec<Vec<Vec<f64>>>,
}

/// A slice's sums over users.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoreTotals {
    /// Rows.
    pub rows: f64,
    /// Positives.
    pub positives: f64,
    /// Log loss by `[seeds][arms]`.
    pub nats: Vec<Vec<f64>>,
}

impl UserTotals {
    /// The sums of one slice that every tally has; all tallies have the same rows.
    pub fn new(tallies: &[ScoreTally], slice: SurfaceTask) -> Self {
        let users = &tallies[0].slices[&slice];
        let of_arm = |tally: &ScoreTally, arm: usize| -> Vec<f64> {
            tally.slices[&slice].values().map(|sums| sums.nats[arm]).collect()
        };
        let of_seed =
            |tally: &ScoreTally| (0..tally.arms.len()).map(|arm| of_arm(tally, arm)).collect();
        Self {
            rows: users.values().map(|sums| f64::from(sums.rows[0])).collect(),
            positives: users.values().map(|sums| f64::from(sums.positives)).collect(),
            nats: tallies.iter().map(of_seed).collect(),
        }
    }

    /// The number of users.
    pub fn users(&self) -> usize {
        self.rows.len()
    }

    /// The sums, with each user counted as often as `weights` says; once without.
    pub fn totals(&self, weights: Option<&[u32]>) -> ScoreTotals {
        let sum = |values: &[f64]| match weights {
            None => values.iter().sum::<f64>(),
            Some(weights) => {
                values.iter().zip(weights).map(|(value, w)| value * f64::from(*w)).sum()
            }
        };
        let seed = |arms: &Vec<Vec<f64>>| arms.iter().map(|arm| sum(arm)).collect();
        ScoreTotals {
            rows: sum(&self.rows),
            positives: sum(&self.positives),
            nats: self.nats.iter().map(seed).collect(),
        }
    }
}

impl ScoreTotals {
    /// The normalised entropy (eq. 5) of an arm; none for one class only.
    pub fn ne(&self, seed: usize, arm: usize) -> Option<f64> {
        normalized_entropy(self.nats[seed][arm], self.positives, self.rows)
    }

    /// How far `arm`'s NE is from `baseline`'s, in per cent of it. On the same rows the entropy of
    /// the base rate cancels.
    pub fn ne_diff_pct(&self, seed: usize, arm: usize, baseline: usize) -> f64 {
        100.0 * (self.nats[seed][arm] / self.nats[seed][baseline] - 1.0)
    }

    /// The mean of [`ScoreTotals::ne_diff_pct`] over seeds.
    pub fn mean_ne_diff_pct(&self, arm: usize, baseline: usize) -> f64 {
        let seeds = self.nats.len();
        (0..seeds).map(|seed| self.ne_diff_pct(seed, arm, baseline)).sum::<f64>() / seeds as f64
    }
}
