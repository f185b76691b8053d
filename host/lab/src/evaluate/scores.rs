//! What was predicted and what came of it: by surface, task and arm over the
//! reported stretch, and by time over the whole stream.
//!
//! Labels are the schema's, whatever a plugin trains on, so that all arms are
//! measured on the same rows.

use std::collections::BTreeMap;
use std::sync::Arc;

use hypercast_fm::{
    example::Example,
    metrics::{Keeper, Scored, cross_entropy},
};
use serde::Serialize;

use super::window::Window;
use crate::demo::{
    replay::{Arm, Slice},
    report::{self, Row},
};
use hypercast_data::schema::Schema;

/// Rows kept a slice.
const KEEP: usize = 1 << 22;

/// Rows of one class that a point in time needs to be drawn.
const LEAST: u64 = 20;

/// One target, as far as scoring asks.
#[derive(Debug, Clone, Copy)]
pub struct Impression {
    /// Who saw it.
    pub user: u64,
    /// Where.
    pub surface: u16,
    /// When, in milliseconds since the epoch.
    pub time_ms: i64,
}

impl Impression {
    /// Of a request's targets.
    pub fn of(example: &Example) -> Self {
        Self { user: example.user.id, surface: example.surface, time_ms: example.time_ms }
    }
}

/// Collects predictions.
#[derive(Debug)]
pub struct Scores {
    schema: Arc<Schema>,
    report_from_ms: i64,
    first_ms: i64,
    every_ms: i64,
    kept: Keeper<Slice>,
    /// By task, arm and number of the stretch of time.
    curve: BTreeMap<(usize, Arm, i64), Sums>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    rows: u64,
    positives: u64,
    nats: f64,
}

/// The normalised entropy of one task and arm over a stretch of time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: &'static str,
    /// The middle of the stretch, in milliseconds since the epoch.
    pub time_ms: i64,
    /// Rows.
    pub n: u64,
    /// Normalised entropy over them.
    pub ne: f64,
}

impl Scores {
    /// For the stretch of `window` that is reported, and points `every_ms` apart.
    pub fn new(schema: &Arc<Schema>, window: &Window, every_ms: i64) -> Self {
        Self {
            schema: schema.clone(),
            report_from_ms: window.report_from_ms,
            first_ms: window.first_ms,
            every_ms: every_ms.max(1),
            kept: Keeper::new(KEEP),
            curve: BTreeMap::new(),
        }
    }

    /// Adds a prediction for a task of the schema.
    pub fn push(
        &mut self,
        at: Impression,
        (task, arm): (usize, Arm),
        probability: f32,
        label: bool,
    ) {
        let stretch = (at.time_ms - self.first_ms).div_euclid(self.every_ms);
        let sums = self.curve.entry((task, arm, stretch)).or_default();
        sums.rows += 1;
        sums.positives += u64::from(label);
        sums.nats += cross_entropy(probability, label);
        if at.time_ms >= self.report_from_ms {
            let scored = Scored { user: at.user, probability, label };
            for surface in [usize::from(at.surface), self.schema.surfaces.len()] {
                self.kept.push((surface, task, arm), scored);
            }
        }
    }

    /// The metrics of the reported stretch.
    pub fn rows(&self) -> Vec<Row> {
        report::rows(&self.schema, &self.kept)
    }

    /// The normalised entropy by time, where the rows can give one.
    pub fn points(&self) -> Vec<Point> {
        let point = |(&(task, arm, stretch), sums): (&(usize, Arm, i64), &Sums)| {
            let least = sums.positives.min(sums.rows - sums.positives);
            (least >= LEAST).then(|| {
                let rate = sums.positives as f64 / sums.rows as f64;
                let base = -(rate * rate.ln() + (1.0 - rate) * (1.0 - rate).ln());
                Point {
                    task: self.schema.tasks[task].name.clone(),
                    arm: report::arm_name(arm),
                    time_ms: self.first_ms + stretch * self.every_ms + self.every_ms / 2,
                    n: sums.rows,
                    ne: sums.nats / sums.rows as f64 / base,
                }
            })
        };
        self.curve.iter().filter_map(point).collect()
    }
}
