//! What the demo shows and writes: quality by surface, task and arm, latency
//! by stage, and how long every step took.

use std::{collections::BTreeMap, fmt};

use hypercast_fm::metrics::{Keeper, Summary};
use serde::Serialize;

use super::replay::{Arm, Outcome, Slice};
use hypercast_data::schema::Schema;
use hypercast_train::report::{ALL, number};

/// The demo's result, as `--json` writes it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Quality, over the same rows for every arm of a surface and task.
    pub rows: Vec<Row>,
    /// Latency by stage.
    pub latency: BTreeMap<String, Latency>,
    /// Requests replayed.
    pub requests: u64,
    /// Of those, answered by the FM's own ranking.
    pub degraded: u64,
    /// Seconds by step.
    pub seconds: BTreeMap<String, f64>,
}

/// One surface, task and arm.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// `base`, `expert`, `fm`, `expert+tae`; `best` in a simulated world.
    pub arm: &'static str,
    /// Normalised entropy.
    pub ne: Option<f64>,
    /// Area under the curve.
    pub auc: Option<f64>,
    /// AUC within users.
    pub gauc: Option<f64>,
    /// Rows.
    pub n: usize,
}

/// Quantiles of a stage, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Latency {
    /// Median.
    pub p50_ms: f64,
    /// 99th percentile.
    pub p99_ms: f64,
}

impl Report {
    /// From a replay.
    pub fn new(schema: &Schema, outcome: Outcome, seconds: BTreeMap<String, f64>) -> Self {
        Self {
            rows: rows(schema, &outcome.kept),
            latency: outcome
                .stages_us
                .into_iter()
                .map(|(stage, took)| (stage, quantiles(took)))
                .collect(),
            requests: outcome.requests,
            degraded: outcome.degraded,
            seconds,
        }
    }
}

/// The metrics of every surface, task and arm; those over all surfaces come last.
pub fn rows(schema: &Schema, kept: &Keeper<Slice>) -> Vec<Row> {
    let row = |(&(surface, task, arm), summary): (&Slice, Summary)| Row {
        surface: schema.surfaces.get(surface).map_or(ALL, String::as_str).to_owned(),
        task: schema.tasks[task].name.clone(),
        arm: arm_name(arm),
        ne: summary.ne,
        auc: summary.auc,
        gauc: summary.gauc,
        n: summary.n,
    };
    kept.summaries().map(row).collect()
}

/// The name of an arm in tables and JSON.
pub fn arm_name(arm: Arm) -> &'static str {
    match arm {
        Arm::Base => "base",
        Arm::Expert => "expert",
        Arm::Fm => "fm",
        Arm::ExpertTae => "expert+tae",
        Arm::Best => "best",
    }
}

fn quantiles(mut took_us: Vec<f64>) -> Latency {
    took_us.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        took_us.get(((took_us.len() as f64 - 1.0) * share) as usize).map_or(0.0, |us| us / 1e3)
    };
    Latency { p50_ms: at(0.5), p99_ms: at(0.99) }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(&self.rows))?;
        writeln!(f, "\n{:<14} {:>9} {:>9}", "stage", "p50 ms", "p99 ms")?;
        for (stage, latency) in &self.latency {
            writeln!(f, "{stage:<14} {:>9.3} {:>9.3}", latency.p50_ms, latency.p99_ms)?;
        }
        writeln!(f, "\n{} requests, {} degraded", self.requests, self.degraded)?;
        let steps: Vec<String> =
            self.seconds.iter().map(|(step, took)| format!("{step} {took:.1} s")).collect();
        writeln!(f, "{}", steps.join(", "))
    }
}

/// The rows for people, an arm a line.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<14} {:<17} {:<11} {:>8} {:>8} {:>8} {:>8}\n",
        "surface", "task", "arm", "rows", "NE", "AUC", "GAUC"
    );
    let mut last = None;
    for row in rows {
        let key = (&row.surface, &row.task);
        let [surface, task] = match last.replace(key) == Some(key) {
            true => ["", ""],
            false => [row.surface.as_str(), row.task.as_str()],
        };
        let [ne, auc, gauc] = [row.ne, row.auc, row.gauc].map(number);
        text += &format!(
            "{surface:<14} {task:<17} {:<11} {:>8} {ne:>8} {auc:>8} {gauc:>8}\n",
            row.arm, row.n
        );
    }
    text
}
