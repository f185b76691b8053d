//! The interface to an expert under test, whether it runs as a component or natively.

use std::any::Any;
use std::sync::Arc;

use hypercast_expert::graph::ExpertGraph;
use hypercast_expert::{ExpertPredictions, Parameters};

use crate::cases::Case;
use crate::contract::{
    ActionBatch, Description, Evaluation, HostInfo, NamedColumn, Prediction, RankRequest, Ranked,
    TaskLabels, TrainingStep, Verdict,
};
use crate::error::Error;

/// The arguments of one `rank` call.
pub(crate) struct RankCall {
    pub(crate) request: RankRequest,
    pub(crate) predictions: Vec<Prediction>,
    pub(crate) columns: Vec<NamedColumn>,
}

/// An expert and its parameters. Faults are returned as text, because a test only prints them.
pub(crate) trait Runtime: Any {
    fn description(&self) -> &Description;
    fn info(&self) -> &HostInfo;
    fn graph(&self) -> &Arc<ExpertGraph>;
    /// The columns that `rank` receives besides the predictions.
    fn rank_columns(&self, case: &Case) -> Vec<NamedColumn>;
    fn predict(&self, case: &Case) -> Result<ExpertPredictions, String>;
    /// Calls `rank` once; a component does so in a fresh instance.
    fn rank(&self, call: &RankCall) -> Result<Vec<Ranked>, String>;
    /// Calls `rank` twice in the same instance.
    fn rank_twice(&self, call: &RankCall) -> Result<[Vec<Ranked>; 2], String>;
    fn labels(&self, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String>;
    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String>;
    fn schedule(&self, step: TrainingStep) -> Result<f32, String>;
    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String>;
    fn parameters(&self) -> &Parameters;
    /// Returns the same expert with other parameters.
    fn with_parameters(&self, parameters: Parameters) -> Result<Box<dyn Runtime>, Error>;
    /// Loads the expert again, with the same parameters.
    fn reloaded(&self) -> Result<Box<dyn Runtime>, Error>;
}

/// The candidates of some requests as the batch that training hooks receive.
pub(crate) fn action_batch(cases: &[Case], info: &HostInfo) -> ActionBatch {
    let rows = || {
        cases.iter().flat_map(|case| case.example.targets.iter().map(move |t| (&case.example, t)))
    };
    let value = |(index, name): (usize, &String)| crate::contract::Outcome {
        name: name.clone(),
        values: rows().map(|(_, target)| target.outcome.values[index]).collect(),
    };
    ActionBatch {
        surface: rows().map(|(example, _)| u32::from(example.surface)).collect(),
        actions: rows().map(|(_, target)| target.outcome.actions).collect(),
        known: rows().map(|(_, target)| target.outcome.known).collect(),
        values: info.values.iter().enumerate().map(value).collect(),
    }
}
