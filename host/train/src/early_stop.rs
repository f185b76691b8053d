//! When passes over a past end, for an expert whose description has `patience`: once so many in a
//! row are no better than the best one, whose parameters are kept.
//!
//! A pass is scored by predictions for rows that no pass learns from: the newest ones, because an
//! expert is served on what comes after its logs. Users that were held out would be strangers to
//! every table of users, and their rows would be as old as the others, so a pass that learns last
//! week's items by heart would look good. The price is that the newest rows are not learned by the
//! passes; an expert that goes on with a stream learns them once, before that.

use std::fmt;
use std::sync::Arc;

use hypercast_data::schema::Schema;
use hypercast_expert::ExpertTrainer;
use hypercast_expert::train::{BatchReport, SavedTrainer, ScoredRows, TaskTargets};
use hypercast_expert::wasm::contract::Task;
use serde::Serialize;

use super::{
    chunk_rows::ChunkRows,
    eval_window::{EvalWindow, WindowPredictions},
    stream::ExpertStream,
};
use crate::error::Result;

/// One row of so many is held out.
const SHARE: u64 = 10;

/// The most rows that are held out, which bounds memory and what is not learned. A mean over so
/// many tells differences of a thousandth.
const MAX_HELD_ROWS: u64 = 1 << 16;

/// How passes over a past ended.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PassScores {
    /// The newest rows, which no pass learned from.
    pub held_rows: usize,
    /// Of each pass, in order; higher is better. Null where nothing tells how good it was.
    pub scores: Vec<f64>,
    /// The pass whose parameters are kept, counted from 1.
    pub best_pass: usize,
}

impl fmt::Display for PassScores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PassScores { held_rows, scores, best_pass } = self;
        let scores: Vec<String> = scores.iter().map(|score| format!("{score:.4}")).collect();
        let scores = scores.join(", ");
        write!(f, "pass {best_pass} is kept: on the {held_rows} newest rows, passes score {scores}")
    }
}

/// The rows that passes learn from, of so many in the order of the logs.
pub(super) fn learned_rows(all: u64) -> u64 {
    all - (all / SHARE).min(MAX_HELD_ROWS)
}

/// The score of each pass so far, and the best one's parameters.
pub(super) struct EarlyStop {
    patience: u32,
    tasks: Vec<Task>,
    schema: Arc<Schema>,
    held: ChunkRows,
    targets: Vec<TaskTargets>,
    scores: Vec<f64>,
    best: Option<BestPass>,
}

struct BestPass {
    /// Counted from 0.
    pass: usize,
    saved: SavedTrainer,
    /// The usual loss of its steps, by which those on the stream are told to be harmful.
    mean_loss: f64,
}

impl EarlyStop {
    /// For passes that do not learn from `held`.
    ///
    /// # Errors
    /// The plugin's `labels` faults.
    pub(super) fn new(
        stream: &ExpertStream,
        patience: u32,
        schema: &Arc<Schema>,
        held: ChunkRows,
    ) -> Result<EarlyStop> {
        Ok(EarlyStop {
            patience,
            tasks: stream.blueprint.description.tasks.clone(),
            schema: schema.clone(),
            targets: stream.trainer.targets(held.chunk())?,
            held,
            scores: Vec::new(),
            best: None,
        })
    }

    /// Scores the pass that has ended; whether passes end with it.
    ///
    /// # Errors
    /// The plugin faults.
    pub(super) fn is_over(&mut self, trainer: &ExpertTrainer) -> Result<bool> {
        let (pass, score) = (self.scores.len(), self.score(trainer)?);
        let best = self.best.as_ref().map(|best| self.scores[best.pass]);
        // A score that is no number is no better than any, and the first pass is the best so far.
        if best.is_none_or(|best| score > best || best.is_nan() && !score.is_nan()) {
            // Two of them at a time would be a copy of all parameters more.
            self.best = None;
            let (saved, mean_loss) = (trainer.saved(), trainer.mean_loss());
            self.best = Some(BestPass { pass, saved, mean_loss });
        }
        self.scores.push(score);
        tracing::info!(pass = pass + 1, score, "the newest rows score a pass of training");
        let without = pass - self.best.as_ref().map_or(pass, |best| best.pass);
        Ok(without >= self.patience as usize)
    }

    fn score(&self, trainer: &ExpertTrainer) -> Result<f64> {
        let (chunk, targets) = (self.held.chunk(), &self.targets);
        let candidate = &trainer.predict(chunk)?;
        let mut window = EvalWindow::new(&self.tasks, &self.schema);
        let said = WindowPredictions { candidate, serving: &[], targets };
        window.push(chunk.examples.iter(), said, |_| true);
        let scored = ScoredRows { candidate, serving: &[], targets };
        let own = trainer.validation_score(&window.evaluation(), chunk, scored)?;
        let score = own.or_else(|| window.mean_error().map(|error| -error));
        Ok(score.unwrap_or_else(|| {
            tracing::warn!(
                rows = self.held.rows,
                "the newest rows of the logs have no outcomes that differ, so no pass is told from \
                 another and the first one is kept; log more rows"
            );
            f64::NAN
        }))
    }

    /// Goes back to the best pass, and has `report` see what its parameters predict of the held
    /// rows. Returns these.
    ///
    /// # Errors
    /// A plugin whose hooks fail.
    pub(super) fn finish(
        self,
        trainer: &mut ExpertTrainer,
        report: impl FnMut(&BatchReport<'_>),
    ) -> Result<(PassScores, ChunkRows)> {
        let EarlyStop { held, scores, best, .. } = self;
        let mut best_pass = scores.len();
        if let Some(BestPass { pass, saved, mean_loss }) = best {
            best_pass = pass + 1;
            if best_pass < scores.len() {
                trainer.go_back(&saved)?;
                trainer.set_mean_loss(mean_loss);
            }
        }
        trainer.measure(held.chunk(), report)?;
        Ok((PassScores { held_rows: held.rows, scores, best_pass }, held))
    }
}

#[cfg(test)]
mod tests;
