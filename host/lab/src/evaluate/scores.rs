//! Predictions with their labels: by surface, task and arm over the reported part of the data, and
//! by time over the whole stream.
//!
//! Labels are the schema's, whatever a plugin trains on, so that all arms are measured on the
//! same rows.

use std::{collections::BTreeMap, sync::Arc};

use hypercast_data::schema::{Schema, TaskKind};
use hypercast_fm::example::Example;
use serde::Serialize;

use super::{
    ranking_scores::{RankingScores, RankingScoresTally},
    window::TestWindow,
};
use crate::{
    demo::replay::PredictionArm,
    error::Result,
    metrics::{LogLossSums, MetricRow, ScoredPrediction, ScoredValue, SlicedPredictions},
    ranking::{RankingReport, RankingTally},
    reliability::Reliability,
    verdict::{Verdict, VerdictTally},
};

/// Rows kept per slice.
const KEEP: usize = 1 << 22;

/// Rows of each label that a point of the curve needs.
const MIN_LABELS: u64 = 20;

/// A label, and the prediction that is scored against it.
#[derive(Debug, Clone, Copy)]
pub struct ScoredImpression {
    /// The user.
    pub user: u64,
    /// Index of the surface.
    pub surface: u16,
    /// The time of the request, milliseconds since the epoch.
    pub time_ms: i64,
    /// Index of the task in the schema.
    pub task: usize,
    /// What predicted.
    pub arm: PredictionArm,
    /// 1 if it happened; the value of a regression.
    pub label: f32,
}

impl ScoredImpression {
    /// A target of a request.
    pub fn of(example: &Example, task: usize, arm: PredictionArm, label: f32) -> Self {
        let Example { surface, time_ms, .. } = *example;
        Self { user: example.user.id, surface, time_ms, task, arm, label }
    }
}

/// Collects predictions and their labels by slice.
#[derive(Debug)]
pub struct EvaluationScores {
    schema: Arc<Schema>,
    report_from_ms: i64,
    first_ms: i64,
    every_ms: i64,
    kept: SlicedPredictions<PredictionArm>,
    verdict: VerdictTally,
    ranking: RankingTally,
    ranking_scores: RankingScoresTally,
    /// By task, arm and index of the interval of time.
    curve: BTreeMap<(usize, PredictionArm, i64), LogLossSums>,
}

/// The normalised entropy of one task and arm over an interval of time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CurvePoint {
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: &'static str,
    /// The middle of the interval, milliseconds since the epoch.
    pub time_ms: i64,
    /// Rows of the interval.
    pub n: u64,
    /// Their normalised entropy.
    pub ne: f64,
}

impl EvaluationScores {
    /// Scores of the reported part of `window`, with points of the curve `every_ms` apart.
    ///
    /// The verdict waits for predictions of boosting if `has_boosting`.
    pub fn new(
        schema: &Arc<Schema>,
        window: &TestWindow,
        every_ms: i64,
        has_boosting: bool,
    ) -> Self {
        Self {
            schema: schema.clone(),
            report_from_ms: window.report_from_ms,
            first_ms: window.first_ms,
            every_ms: every_ms.max(1),
            kept: SlicedPredictions::new(schema, KEEP),
            verdict: VerdictTally::new(schema, has_boosting),
            ranking: RankingTally::new(schema),
            ranking_scores: RankingScoresTally::new(schema, KEEP),
            curve: BTreeMap::new(),
        }
    }

    /// Counts a prediction for each of its slices.
    pub fn push(&mut self, of: ScoredImpression, prediction: f32) {
        let ScoredImpression { user, time_ms, task, arm, label, .. } = of;
        if time_ms >= self.report_from_ms {
            self.ranking.push(&of, prediction);
        }
        if self.schema.tasks[task].kind == TaskKind::Regression {
            if time_ms >= self.report_from_ms {
                self.kept.push_value(of.surface, task, &arm, ScoredValue { prediction, label });
            }
            return;
        }
        let (probability, label) = (prediction, label == 1.0);
        let interval = (time_ms - self.first_ms).div_euclid(self.every_ms);
        let sums = self.curve.entry((task, arm, interval)).or_default();
        *sums += LogLossSums::of(probability, label);
        if time_ms >= self.report_from_ms {
            let scored = ScoredPrediction { user, probability, label };
            self.kept.push(of.surface, task, &arm, scored);
            self.verdict.push(of.surface, task, arm, scored);
        }
    }

    /// Counts a ranking score of a row that was pushed with its prediction.
    pub fn push_score(&mut self, of: &ScoredImpression, prediction: f32, score: f32) {
        if of.time_ms >= self.report_from_ms {
            self.ranking_scores.push(of, prediction, score);
        }
    }

    /// The orders by ranking scores, of the reported part.
    pub fn ranking_scores(&self) -> RankingScores {
        self.ranking_scores.report()
    }

    /// What was predicted against what happened, of the reported part.
    pub fn reliability(&self) -> Reliability {
        self.kept.reliability(|arm| arm.name().to_owned())
    }

    /// The metrics of the reported part.
    pub fn rows(&self) -> Vec<MetricRow> {
        self.kept.rows(|arm| arm.name().to_owned())
    }

    /// The order within requests of the reported part.
    pub fn ranking(&self) -> RankingReport {
        self.ranking.report()
    }

    /// What the metrics of the reported part mean.
    ///
    /// # Errors
    /// Arms that predicted different rows.
    pub fn verdict(&self) -> Result<Verdict> {
        self.verdict.verdict()
    }

    /// The normalised entropy by time, where there are enough rows of both labels.
    pub fn points(&self) -> Vec<CurvePoint> {
        let mut points = Vec::new();
        for (&(task, arm, interval), sums) in &self.curve {
            if sums.positives.min(sums.count - sums.positives) < MIN_LABELS {
                continue;
            }
            points.extend(sums.normalized_entropy().map(|ne| CurvePoint {
                task: self.schema.tasks[task].name.clone(),
                arm: arm.name(),
                time_ms: self.first_ms + interval * self.every_ms + self.every_ms / 2,
                n: sums.count,
                ne,
            }));
        }
        points
    }
}
