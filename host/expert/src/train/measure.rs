//! Predictions of a trainer for rows that it does not learn from, or not yet.

use super::chunk::Chunk;
use super::evaluation_sample::ScoredRows;
use super::hooks::TrainingRequest;
use super::trainer::{BatchReport, ExpertTrainer, ServingParameters, by_task, examples, gathered};
use crate::Error;

/// Predictions of some rows, `[rows]` a task; none of what serves where it is not asked.
#[derive(Default)]
pub(super) struct PredictedRows {
    pub(super) predictions: Vec<Vec<f32>>,
    pub(super) serving: Vec<Vec<f32>>,
}

impl ExpertTrainer {
    /// Predicts a chunk as a progressive pass does, and does not learn from it. `report` is called
    /// for every batch.
    ///
    /// # Errors
    /// As [`ExpertTrainer::train`].
    pub fn measure(
        &mut self,
        chunk: Chunk,
        mut report: impl FnMut(&BatchReport),
    ) -> Result<(), Error> {
        let requests = self.requests(chunk)?;
        let all = self.targets(chunk)?;
        let mut rest = requests.as_slice();
        while !rest.is_empty() {
            let (batch, after) = rest.split_at(self.batch_len(rest));
            let PredictedRows { predictions, serving } = self.predicted(batch);
            let targets = gathered(&all, batch);
            self.sample_requests(
                batch,
                ScoredRows { candidate: &predictions, serving: &serving, targets: &targets },
            );
            report(&BatchReport {
                examples: &examples(batch),
                predictions,
                serving,
                targets: &targets,
                losses: vec![0.0; targets.len()],
                stepped: false,
            });
            rest = after;
        }
        Ok(())
    }

    /// What the parameters so far predict of requests, and what those do that serve, unless they
    /// have learned from all of them.
    pub(super) fn predicted(&self, requests: &[TrainingRequest]) -> PredictedRows {
        let new_to = |serving: &&ServingParameters| {
            let is_new = |own: &TrainingRequest| own.example.time_ms > serving.learned_until_ms;
            requests.iter().any(is_new)
        };
        let serving = self.serving.as_ref().filter(new_to);
        PredictedRows {
            predictions: by_task(self.forward(self.parameters(), requests)),
            serving: serving
                .map_or_else(Vec::new, |own| by_task(self.forward(&own.parameters, requests))),
        }
    }
}
