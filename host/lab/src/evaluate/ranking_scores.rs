//! Ranking scores beside probabilities: how well each orders the rows of a user (GAUC) and those of
//! a request (NDCG), on the same rows.

use std::{fmt, sync::Arc};

use hypercast_core::text_table::TextTable;
use hypercast_data::schema::{Schema, TaskKind};
use hypercast_train::report::{ALL, number};
use serde::Serialize;

use super::scores::ScoredImpression;
use crate::{
    demo::replay::PredictionArm,
    metrics::{MetricRow, ScoredPrediction, SlicedPredictions},
    ranking::{RankingReport, RankingTally},
};

/// Collects rows of experts that have ranking scores.
#[derive(Debug)]
pub struct RankingScoresTally {
    schema: Arc<Schema>,
    by_prediction: OrderTally,
    by_score: OrderTally,
}

/// The rows as one number orders them.
#[derive(Debug)]
struct OrderTally {
    users: SlicedPredictions<PredictionArm>,
    requests: RankingTally,
}

/// The orders of one arm for one surface and task.
#[derive(Debug, Clone, Serialize)]
pub struct RankingScore {
    /// The surface, or `all`.
    pub surface: String,
    /// The task.
    pub task: String,
    /// The arm.
    pub arm: String,
    /// Rows with a label.
    pub n: usize,
    /// GAUC of the probability.
    pub gauc: Option<f64>,
    /// GAUC of the ranking score.
    pub score_gauc: Option<f64>,
    /// NDCG of the probability within requests, over all surfaces alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ndcg: Option<f64>,
    /// NDCG of the ranking score, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score_ndcg: Option<f64>,
}

/// The orders of all arms that have ranking scores, binary tasks alone.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(transparent)]
pub struct RankingScores(pub Vec<RankingScore>);

impl OrderTally {
    fn new(schema: &Arc<Schema>, keep: usize) -> Self {
        let (users, requests) = (SlicedPredictions::new(schema, keep), RankingTally::new(schema));
        Self { users, requests }
    }

    fn push(&mut self, of: &ScoredImpression, by: f32) {
        let ScoredImpression { user, surface, task, arm, label, .. } = *of;
        let row = ScoredPrediction { user, probability: by, label: label == 1.0 };
        self.users.push(surface, task, &arm, row);
        self.requests.push(of, by);
    }

    fn rows(&self) -> Vec<MetricRow> {
        self.users.rows(|arm| arm.name().to_owned())
    }
}

impl RankingScoresTally {
    /// No rows yet; of each surface, task and arm at most the newest `keep` count for GAUC.
    pub fn new(schema: &Arc<Schema>, keep: usize) -> Self {
        let order = || OrderTally::new(schema, keep);
        Self { schema: schema.clone(), by_prediction: order(), by_score: order() }
    }

    /// Adds a row of a binary task, behind the others of its request.
    pub fn push(&mut self, of: &ScoredImpression, prediction: f32, score: f32) {
        if self.schema.tasks[of.task].kind == TaskKind::Binary {
            self.by_prediction.push(of, prediction);
            self.by_score.push(of, score);
        }
    }

    /// The orders of the rows so far.
    pub fn report(&self) -> RankingScores {
        let requests = [&self.by_prediction, &self.by_score].map(|by| by.requests.report());
        let rows = self.by_prediction.rows().into_iter().zip(self.by_score.rows());
        let of = |(prediction, score): (MetricRow, MetricRow)| {
            let MetricRow { surface, task, arm, metrics } = prediction;
            let [ndcg, score_ndcg] =
                requests.each_ref().map(|of| ndcg(of, &task, &arm).filter(|_| surface == ALL));
            let (gauc, score_gauc) = (metrics.gauc, score.metrics.gauc);
            RankingScore { surface, task, arm, n: metrics.n, gauc, score_gauc, ndcg, score_ndcg }
        };
        RankingScores(rows.map(of).collect())
    }
}

fn ndcg(report: &RankingReport, task: &str, arm: &str) -> Option<f64> {
    let task = report.tasks.iter().find(|own| own.task == task)?;
    task.arms.iter().find(|own| own.arm == arm).map(|own| own.ndcg)
}

/// Those over all surfaces.
impl fmt::Display for RankingScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["task", "arm", "GAUC", "of score", "NDCG", "of score"];
        let mut table = TextTable::new(2, head);
        for own in self.0.iter().filter(|own| own.surface == ALL) {
            let numbers = [own.gauc, own.score_gauc, own.ndcg, own.score_ndcg].map(number);
            table.line([own.task.clone(), own.arm.clone()].into_iter().chain(numbers));
        }
        if table.is_empty() { Ok(()) } else { write!(f, "\nranking scores:\n{table}") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hypercast_data::simulate;

    #[test]
    fn a_score_without_the_users_level_orders_users_better_and_requests_alike() {
        let mut tally = RankingScoresTally::new(&Arc::new(simulate::schema(1)), 1000);
        let arm = PredictionArm::ExpertTae;
        for user in 0..10 {
            // The user's level falls from request to request, and the better item gets the outcome.
            for request in 0..4u8 {
                for item in 0..2u8 {
                    let label = f32::from(item);
                    let time_ms = i64::from(request);
                    let of = ScoredImpression { user, surface: 0, time_ms, task: 0, arm, label };
                    let score = 0.1 * label;
                    tally.push(&of, 0.8 - 0.2 * f32::from(request) + score, score);
                }
            }
        }
        let RankingScores(all) = tally.report();
        let own = all.iter().find(|own| own.surface == ALL).expect("it has rows");
        assert_eq!((own.n, own.score_gauc), (80, Some(1.0)));
        assert!(own.gauc.is_some_and(|gauc| (0.5..0.7).contains(&gauc)), "{own:?}");
        assert_eq!((own.ndcg, own.score_ndcg), (Some(1.0), Some(1.0)));
        let of_surface = all.iter().find(|own| own.surface != ALL).expect("it has rows");
        assert_eq!((of_surface.ndcg, of_surface.n), (None, 80));
        assert!(tally.report().to_string().contains("of score"));
    }
}
