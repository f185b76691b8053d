//! Training of an expert: labels, sampling and learning rates by the plugin's hooks, masked losses,
//! Adam for dense parameters, row-wise Adagrad for tables.
//!
//! The trainer takes chunks of examples with their TAEs and does not know the FM. Metrics are the
//! caller's: it gets the predictions of every batch from before the step.

mod chunk;
pub(crate) mod evaluation_sample;
mod hooks;
mod loss;
mod measure;
mod optimizer;
mod saved;
mod step;
#[cfg(test)]
mod tests;
mod trainer;

pub use chunk::Chunk;
pub use evaluation_sample::ScoredRows;
pub use hooks::RefusedRequest;
pub(crate) use loss::prediction;
pub use loss::{TaskTargets, task_loss};
pub use optimizer::{ExpertOptimizer, OptimizerConfig};
pub use saved::SavedTrainer;
pub use step::{Compute, Gradients, LossFn, OutputGradients, compute};

pub use trainer::{BatchReport, ExpertTrainer, ServingParameters, TrainerConfig};
