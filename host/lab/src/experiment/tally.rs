//! Sums of log-loss by user, from which NE and its interval are computed.
//!
//! A replicate of the bootstrap needs a user's sums alone, never the rows.

use std::collections::BTreeMap;

use hypercast_fm::{example::Example, metrics::cross_entropy};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::labels::Labels;

/// What a user's rows come to, for every arm.
#[derive(Debug, Clone, PartialEq)]
struct UserSums {
    rows: Vec<u32>,
    positives: u32,
    nats: Vec<f64>,
}

/// Surface (the number of surfaces for all) and task, as indices of the schema.
pub type Slice = (usize, usize);

/// One seed's sums, by surface and task.
#[derive(Debug, Clone)]
pub struct Tally {
    labels: Labels,
    from_ms: i64,
    arms: Vec<String>,
    slices: BTreeMap<Slice, BTreeMap<u64, UserSums>>,
}

impl Tally {
    /// For some arms, of which the first is compared with; rows before `from_ms` do not count.
    pub fn new(labels: &Labels, from_ms: i64, arms: &[&str]) -> Self {
        let arms = arms.iter().map(|arm| arm.to_string()).collect();
        Self { labels: labels.clone(), from_ms, arms, slices: BTreeMap::new() }
    }

    /// The arms' names.
    pub fn arms(&self) -> &[String] {
        &self.arms
    }

    /// Adds what arm `arm` predicted for a target and a task of the schema; a target outside the
    /// task's sample space, or a prediction that is not a number, counts nothing.
    pub fn push(&mut self, arm: usize, (example, row): (&Example, usize), task: usize, said: f32) {
        if example.time_ms < self.from_ms || said.is_nan() {
            return;
        }
        let Some(label) = self.labels.label(example, row, task) else { return };
        let nats = cross_entropy(said, label);
        let arms = self.arms.len();
        for surface in [usize::from(example.surface), self.labels.schema.surfaces.len()] {
            let users = self.slices.entry((surface, task)).or_default();
            let sums = users.entry(example.user.id).or_insert_with(|| UserSums {
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
    pub fn slices(&self) -> Result<Vec<Slice>> {
        let mut all = Vec::new();
        for (slice, users) in &self.slices {
            let rows =
                |arm: usize| users.values().map(|sums| u64::from(sums.rows[arm])).sum::<u64>();
            let counts: Vec<u64> = (0..self.arms.len()).map(rows).collect();
            if counts.contains(&0) {
                continue;
            }
            if users.values().any(|sums| sums.rows.iter().any(|rows| *rows != sums.rows[0])) {
                let task = &self.labels.schema.tasks[slice.1].name;
                return Err(Error::invalid(format!(
                    "task {task:?}: the arms {:?} predicted {counts:?} rows, and not the same ones",
                    self.arms
                )));
            }
            all.push(*slice);
        }
        Ok(all)
    }
}

/// The sums of one slice over seeds, laid out for resampling.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Rows a user.
    pub rows: Vec<f64>,
    /// Positives a user.
    pub positives: Vec<f64>,
    /// `[seeds][arms]`, each of log-loss a user.
    pub nats: Vec<Vec<Vec<f64>>>,
}

/// A slice's sums over users.
#[derive(Debug, Clone, PartialEq)]
pub struct Totals {
    /// Rows.
    pub rows: f64,
    /// Positives.
    pub positives: f64,
    /// `[seeds][arms]` of log-loss.
    pub nats: Vec<Vec<f64>>,
}

impl Dense {
    /// Of one slice that every tally holds; the tallies are of the same rows.
    pub fn new(tallies: &[Tally], slice: Slice) -> Self {
        let users = &tallies[0].slices[&slice];
        let of_arm = |tally: &Tally, arm: usize| -> Vec<f64> {
            tally.slices[&slice].values().map(|sums| sums.nats[arm]).collect()
        };
        let of_seed = |tally: &Tally| (0..tally.arms.len()).map(|arm| of_arm(tally, arm)).collect();
        Self {
            rows: users.values().map(|sums| f64::from(sums.rows[0])).collect(),
            positives: users.values().map(|sums| f64::from(sums.positives)).collect(),
            nats: tallies.iter().map(of_seed).collect(),
        }
    }

    /// Users.
    pub fn users(&self) -> usize {
        self.rows.len()
    }

    /// The sums, with each user counted as often as `weights` says; once without.
    pub fn totals(&self, weights: Option<&[u32]>) -> Totals {
        let sum = |values: &[f64]| match weights {
            None => values.iter().sum::<f64>(),
            Some(weights) => {
                values.iter().zip(weights).map(|(value, w)| value * f64::from(*w)).sum()
            }
        };
        let seed = |arms: &Vec<Vec<f64>>| arms.iter().map(|arm| sum(arm)).collect();
        Totals {
            rows: sum(&self.rows),
            positives: sum(&self.positives),
            nats: self.nats.iter().map(seed).collect(),
        }
    }
}

impl Totals {
    /// The normalised entropy (eq. 5) of an arm; none for one class only.
    pub fn ne(&self, seed: usize, arm: usize) -> Option<f64> {
        let rate = self.positives / self.rows;
        (rate > 0.0 && rate < 1.0).then(|| {
            let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
            self.nats[seed][arm] / self.rows / base
        })
    }

    /// How far `arm`'s NE is from `baseline`'s, in per cent of it. On the same rows the entropy of the
    /// base rate cancels.
    pub fn ne_diff_pct(&self, seed: usize, arm: usize, baseline: usize) -> f64 {
        100.0 * (self.nats[seed][arm] / self.nats[seed][baseline] - 1.0)
    }

    /// The mean of [`Totals::ne_diff_pct`] over seeds.
    pub fn mean_ne_diff_pct(&self, arm: usize, baseline: usize) -> f64 {
        let seeds = self.nats.len();
        (0..seeds).map(|seed| self.ne_diff_pct(seed, arm, baseline)).sum::<f64>() / seeds as f64
    }
}
