//! The request that `Expert::rank` receives, and small rules to score and order its candidates.
//!
//! A score has whatever scale the team chooses: the host returns scores to the caller and does not
//! compare them with those of other experts.

use crate::columns;
use crate::raw::types::{Column, NamedColumn, Prediction, RankRequest, Ranked};

/// One request, with the predictions and columns of its candidates.
#[derive(Debug, Clone)]
pub struct Request {
    /// The surface on which the candidates will be shown.
    pub surface: String,
    /// The id of the user to rank for.
    pub user: u64,
    /// The time of the request, in milliseconds since the epoch.
    pub time_ms: i64,
    /// The request's id, as answers and logs have it.
    pub id: u64,
    /// A hash of the id, for [`Chance`](crate::Chance) and the rankings that explore.
    pub seed: u64,
    /// The candidates' item ids.
    pub candidates: Vec<u64>,
    /// How many candidates the caller wants back.
    pub limit: usize,
    predictions: Vec<Prediction>,
    /// Ranking scores, under the names of their tasks.
    scores: Vec<Prediction>,
    columns: Vec<NamedColumn>,
}

/// What the host adds to a task's name to name its ranking score.
const SCORE: &str = ":score";

/// Allows at most `at_most` candidates with the same key in any `window` consecutive places.
#[derive(Debug, Clone, Copy)]
pub struct Diversity {
    /// The most candidates with the same key within a window.
    pub at_most: usize,
    /// The length of the window, in places of the ranking.
    pub window: usize,
}

impl Request {
    /// Builds a request from the arguments of the contract's `rank`.
    pub fn new(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Self {
        let (predictions, scores) = without_scores(predictions);
        Self {
            surface: request.surface,
            user: request.user,
            time_ms: request.time_ms,
            id: request.request,
            seed: request.seed,
            limit: request.limit as usize,
            candidates: request.candidates,
            predictions,
            scores,
            columns,
        }
    }

    /// The predictions of all tasks, in the description's order.
    pub fn predictions(&self) -> &[Prediction] {
        &self.predictions
    }

    /// One task's prediction for each candidate: a probability, or the value of a regression.
    pub fn prediction(&self, task: &str) -> Result<&[f32], String> {
        let found = self.predictions.iter().find(|p| p.task == task);
        found
            .map(|p| p.values.as_slice())
            .ok_or_else(|| format!("rank: no prediction of task `{task}`"))
    }

    /// One task's ranking score for each candidate, which the network sets with
    /// [`Graph::score`](crate::Graph::score); the prediction of a task that has none.
    pub fn score(&self, task: &str) -> Result<&[f32], String> {
        let found = self.scores.iter().find(|own| own.task == task);
        found.map_or_else(|| self.prediction(task), |own| Ok(own.values.as_slice()))
    }

    /// A numeric feature of each candidate, as it is; 0 where it is missing, which the feature
    /// `NAME_missing` tells apart. Declare it with `Description::rank_feature`.
    pub fn feature(&self, name: &str) -> Result<&[f32], String> {
        columns::numbers(&self.columns, &Column::feature(name), "rank_feature")
    }

    /// A categorical feature or raw id of each candidate; of several values the first, and 0
    /// without any. Declare it with `Description::rank_id`.
    pub fn id(&self, name: &str) -> Result<&[u64], String> {
        columns::ids(&self.columns, &Column::id(name), "rank_id")
    }

    /// A vector of each candidate, row-major; zeros for an item without one. Declare it with
    /// `Description::rank_vector`.
    pub fn vector(&self, name: &str) -> Result<&[f32], String> {
        columns::numbers(&self.columns, &Column::vector(name), "rank_vector")
    }

    /// The target-aware embeddings, row-major. Declare them with `Description::rank_tae`.
    pub fn tae(&self) -> Result<&[f32], String> {
        columns::numbers(&self.columns, &Column::tae(), "rank_tae")
    }

    /// The FM's own predictions of a task: log odds, or values of a regression; 0 where the FM did
    /// not answer. Declare them with `Description::rank_fm_logit`.
    pub fn fm_logit(&self, task: &str) -> Result<&[f32], String> {
        columns::numbers(&self.columns, &Column::fm_logit(task), "rank_fm_logit")
    }

    /// The value model `sum of weight(task) * prediction`. Returns one score per candidate.
    pub fn weighted_sum(&self, weight: impl Fn(&str) -> f32) -> Vec<f32> {
        self.combine(0.0, |score, task, prediction| score + weight(task) * prediction)
    }

    /// The value model `product of prediction ^ weight(task)`. Returns one score per candidate.
    /// Predictions below 0 count as 0.
    pub fn weighted_product(&self, weight: impl Fn(&str) -> f32) -> Vec<f32> {
        self.combine(1.0, |score, task, prediction| score * prediction.max(0.0).powf(weight(task)))
    }

    /// The `limit` best candidates by score. Ties are broken by index.
    pub fn top(&self, scores: &[f32]) -> Vec<Ranked> {
        self.slate(scores).top()
    }

    /// Like `top`, but delays a candidate while `at_most` of the last `window - 1` places have its
    /// key. If that applies to all remaining candidates, the best of them is placed anyway, so the
    /// ranking is as long as that of `top`.
    pub fn top_diverse(&self, scores: &[f32], keys: &[u64], rule: Diversity) -> Vec<Ranked> {
        let mut waiting = self.slate(scores).by_score();
        let mut placed: Vec<Ranked> = Vec::with_capacity(self.limit.min(waiting.len()));
        while placed.len() < self.limit && !waiting.is_empty() {
            let recent = &placed[placed.len().saturating_sub(rule.window.saturating_sub(1))..];
            let fits = |r: &Ranked| {
                let same =
                    |p: &&Ranked| keys.get(p.candidate as usize) == keys.get(r.candidate as usize);
                recent.iter().filter(same).count() < rule.at_most
            };
            let next = waiting.iter().position(fits).unwrap_or(0);
            placed.push(waiting.remove(next));
        }
        placed
    }

    fn combine(&self, start: f32, step: impl Fn(f32, &str, f32) -> f32) -> Vec<f32> {
        let mut scores = vec![start; self.candidates.len()];
        for prediction in &self.predictions {
            for (score, &value) in scores.iter_mut().zip(&prediction.values) {
                *score = step(*score, &prediction.task, value);
            }
        }
        scores
    }
}

/// Candidates in the order of their scores. Equal ones stay in theirs.
pub(crate) fn best_first(mut all: Vec<Ranked>) -> Vec<Ranked> {
    // NaN is not ordered. Put it last; the host reports it.
    all.sort_by(|Ranked { score: a, .. }, Ranked { score: b, .. }| {
        b.partial_cmp(a).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
    });
    all
}

/// The predictions of tasks, and the ranking scores under the names of their tasks.
fn without_scores(predictions: Vec<Prediction>) -> (Vec<Prediction>, Vec<Prediction>) {
    let tasks: Vec<String> = predictions.iter().map(|own| own.task.clone()).collect();
    // A task may be called so itself; the host refuses one that has the name of another's score.
    let scored = |name: &str| {
        name.strip_suffix(SCORE)
            .filter(|task| tasks.iter().any(|own| own == task))
            .map(str::to_owned)
    };
    let (mut own, mut scores) = (Vec::new(), Vec::new());
    for prediction in predictions {
        match scored(&prediction.task) {
            Some(task) => scores.push(Prediction { task, ..prediction }),
            None => own.push(prediction),
        }
    }
    (own, scores)
}
