//! Training an expert: labels, sampling and rates by the plugin's own hooks, masked
//! losses, Adam for dense parameters, row-wise Adagrad for tables.
//!
//! The trainer takes chunks of examples with their TAEs, as the logs hold them,
//! and knows nothing of the FM. What it measures is up to the caller, who gets
//! every batch's predictions before that batch is learnt from.

mod average;
mod hooks;
mod loss;
mod optimizer;
mod rate;
mod saved;
mod step;
#[cfg(test)]
mod tests;
mod trainer;

pub use loss::{TaskTargets, task_loss};
pub use optimizer::{Optimizer, OptimizerConfig};
pub use saved::SavedTrainer;
pub use step::{Compute, Gradients, LossFn, Seed, compute};
pub(crate) use trainer::prediction;
pub use trainer::{BatchReport, Chunk, ExpertTrainer, Serving, TrainerConfig};
