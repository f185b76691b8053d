//! The result of an experiment, for people and as JSON.

use std::collections::BTreeMap;

use hypercast_core::text_table::TextTable;
use hypercast_train::report::ALL;
use serde::Serialize;
use serde_json::Value;

use super::{ExperimentContext, scaling::ScalingLaw};
use crate::{
    bootstrap::intervals,
    error::Result,
    tally::{ScoreTally, ScoreTotals, SurfaceTask, UserTotals},
};

/// The result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct ExperimentReport {
    /// `tae`, `transfer`, `unseen`, `compute`, `publish`, `scaling`, `ablation` or `ab`.
    pub experiment: String,
    /// Data set, window, sizes of models, plugin and everything else that was chosen.
    pub config: Value,
    /// Seeds of FM and experts.
    pub seeds: Vec<u64>,
    /// A row per surface, task, arm and seed, and one for the mean over seeds.
    pub rows: Vec<ExperimentRow>,
    /// The models' costs (`compute`, `scaling`), the published bytes (`publish`), or what users did
    /// under each arm (`ab`); empty otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<Value>,
    /// How NE falls with training FLOPs (`scaling`); empty otherwise.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub laws: Vec<ScalingLaw>,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
    /// The table for people.
    #[serde(skip)]
    pub table: String,
    /// The laws as an SVG (`scaling`).
    #[serde(skip)]
    pub plot: Option<String>,
}

/// One surface, task and arm.
#[derive(Debug, Clone, Serialize)]
pub struct ExperimentRow {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: String,
    /// The seed's number, or `mean`.
    pub seed: Value,
    /// Rows predicted.
    pub n: u64,
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Its difference from the baseline's, in per cent; below 0 is better.
    pub ne_diff_pct: Option<f64>,
    /// The 95 % interval of the difference, from the bootstrap over users.
    pub ci95: Option<[f64; 2]>,
    /// Columns of this experiment only.
    #[serde(flatten)]
    pub more: BTreeMap<&'static str, Value>,
}

/// Two arms, the second compared with the first.
#[derive(Debug, Clone, Copy)]
pub struct ArmPair {
    /// Index of the baseline's arm.
    pub baseline: usize,
    /// Index of the arm.
    pub arm: usize,
}

/// The sums of one surface and task.
pub struct SliceTotals {
    /// Where it is.
    pub slice: SurfaceTask,
    /// The arms' names.
    pub arms: Vec<String>,
    /// Its sums by user.
    pub dense: UserTotals,
    /// Its sums.
    pub totals: ScoreTotals,
}

impl SliceTotals {
    /// The slices that every arm of every seed predicts; those over all surfaces come last.
    ///
    /// # Errors
    /// Arms that predicted different rows.
    pub fn all(tallies: &[ScoreTally]) -> Result<Vec<SliceTotals>> {
        let mut slices = tallies[0].slices()?;
        for tally in &tallies[1..] {
            let own = tally.slices()?;
            slices.retain(|slice| own.contains(slice));
        }
        let of = |slice| {
            let dense = UserTotals::new(tallies, slice);
            let (arms, totals) = (tallies[0].arms.clone(), dense.totals(None));
            SliceTotals { slice, arms, totals, dense }
        };
        Ok(slices.into_iter().map(of).collect())
    }
}

impl ExperimentContext<'_> {
    /// The rows of some pairs on a slice: one a seed, then the mean.
    pub fn rows_of(&self, cell: &SliceTotals, pairs: &[ArmPair]) -> Vec<ExperimentRow> {
        let seeds = self.options.seeds.0.len();
        let measure = |totals: &ScoreTotals| {
            let of_pair = |pair: &ArmPair| {
                let each = (0..seeds).map(|seed| totals.ne_diff_pct(seed, pair.arm, pair.baseline));
                let mean = totals.mean_ne_diff_pct(pair.arm, pair.baseline);
                each.chain([mean]).collect::<Vec<f64>>()
            };
            pairs.iter().flat_map(of_pair).collect()
        };
        let bounds = self
            .times
            .time("bootstrap", || intervals(&cell.dense, self.options.replicates, measure));
        let mut rows = Vec::new();
        for (pair, bounds) in pairs.iter().zip(bounds.chunks_exact(seeds + 1)) {
            for (seed, bounds) in bounds.iter().enumerate() {
                rows.push(self.row(cell, *pair, (seed < seeds).then_some(seed), *bounds));
            }
        }
        rows
    }

    fn row(
        &self,
        cell: &SliceTotals,
        pair: ArmPair,
        seed: Option<usize>,
        ci95: [f64; 2],
    ) -> ExperimentRow {
        let (totals, schema) = (&cell.totals, &self.dataset.schema);
        let seeds = self.options.seeds.0.len();
        let diffs: Vec<f64> =
            (0..seeds).map(|seed| totals.ne_diff_pct(seed, pair.arm, pair.baseline)).collect();
        let nes: Option<Vec<f64>> = (0..seeds).map(|seed| totals.ne(seed, pair.arm)).collect();
        let baseline = pair.arm == pair.baseline;
        let mut more = BTreeMap::new();
        more.insert("baseline", Value::from(cell.arms[pair.baseline].as_str()));
        if seed.is_none() && !baseline {
            more.insert("sd_seeds", Value::from(deviation(&diffs)));
        }
        ExperimentRow {
            surface: schema.surfaces.get(cell.slice.surface).map_or(ALL, String::as_str).to_owned(),
            task: schema.tasks[cell.slice.task].name.clone(),
            arm: cell.arms[pair.arm].clone(),
            seed: seed.map_or("mean".into(), |seed| self.options.seeds.0[seed].into()),
            n: totals.rows as u64,
            ne: nes.map(|nes| seed.map_or_else(|| mean(&nes), |seed| nes[seed])),
            ne_diff_pct: Some(seed.map_or_else(|| mean(&diffs), |seed| diffs[seed])),
            ci95: ci95[0].is_finite().then_some(ci95),
            more,
        }
    }
}

/// The mean over seeds.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation over seeds; none of one seed.
fn deviation(values: &[f64]) -> Option<f64> {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (values.len() > 1).then(|| (squares / (values.len() as f64 - 1.0)).sqrt())
}

/// A difference with its interval: `-2.13 [-2.40, -1.85]`.
pub fn with_interval(value: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    match (value, ci95) {
        // An arm compared with itself.
        (Some(0.0), Some([0.0, 0.0])) => "0".into(),
        (Some(value), Some([low, high])) => format!("{value:+.2} [{low:+.2}, {high:+.2}]"),
        (Some(value), None) => format!("{value:.2}"),
        (None, _) => "-".into(),
    }
}

/// A table with a line per arm and a column per task, for one surface, like the paper's table 1.
pub fn arms_by_task(rows: &[ExperimentRow], surface: &str) -> String {
    let means = || rows.iter().filter(|row| row.surface == surface && row.seed == "mean");
    let (mut tasks, mut arms): (Vec<&str>, Vec<&str>) = (Vec::new(), Vec::new());
    for row in means() {
        if !tasks.contains(&row.task.as_str()) {
            tasks.push(&row.task);
        }
        if !arms.contains(&row.arm.as_str()) {
            arms.push(&row.arm);
        }
    }
    let head = [format!("NE diff (%), {surface}")].into_iter();
    let mut table = TextTable::new(1, head.chain(tasks.iter().map(|task| task.to_string())));
    for arm in arms {
        let cell = |task: &&str| {
            let row = means().find(|row| row.task == *task && row.arm == arm);
            row.map_or("-".into(), |row| with_interval(row.ne_diff_pct, row.ci95))
        };
        table.line([arm.to_owned()].into_iter().chain(tasks.iter().map(cell)));
    }
    table.to_string()
}

impl std::fmt::Display for ExperimentReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.table)?;
        let (seeds, seconds) = (&self.seeds, crate::demo::step_times(&self.seconds));
        if self.rows.is_empty() {
            return writeln!(f, "\nseeds {seeds:?}; {seconds}");
        }
        writeln!(f, "\nmean over seeds {seeds:?}; [95 % interval, bootstrap over users]; {seconds}")
    }
}
