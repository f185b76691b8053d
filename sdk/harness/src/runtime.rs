//! The interface to an expert's own code, whether it runs as a component or natively.

use std::sync::Arc;

use hypercast_expert::Blueprint;

use crate::contract::{
    ActionBatch, Evaluation, EvaluationRows, NamedColumn, Prediction, RankRequest, Ranked,
    TaskLabels, TrainingStep, Verdict,
};
use crate::error::Error;
use crate::harness::Harness;
use crate::world::World;

/// The arguments of one `rank` call.
pub(crate) struct RankCall {
    pub(crate) request: RankRequest,
    pub(crate) predictions: Vec<Prediction>,
    pub(crate) columns: Vec<NamedColumn>,
}

/// An expert's functions. Faults are returned as text, because a test only prints them.
pub(crate) trait ExpertCode {
    /// Calls `rank` once; a component does so in a fresh instance.
    fn rank(&self, call: &RankCall) -> Result<Vec<Ranked>, String>;
    /// Calls `rank` twice in the same instance.
    fn rank_twice(&self, call: &RankCall) -> Result<[Vec<Ranked>; 2], String>;
    fn labels(&self, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String>;
    /// The weights of each task of the description; none where all are 1.
    fn weights(&self, batch: &ActionBatch) -> Result<Vec<Vec<f32>>, String>;
    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String>;
    fn schedule(&self, step: TrainingStep) -> Result<f32, String>;
    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String>;
    fn evaluate_rows(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Verdict, String>;
    fn validation_score(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, String>;
    /// Loads the expert again.
    fn load(&self, world: &World) -> Result<Harness, Error>;
    /// What the host's trainer needs; none for native code, which it cannot call.
    fn blueprint(&self) -> Option<&Arc<Blueprint>>;
}
