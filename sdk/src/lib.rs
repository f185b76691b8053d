//! `hypercast-sdk`: what a surface team writes an expert with.
//!
//! An expert is a type that implements [`Expert`] and is named in [`export!`].
//! Its network is built once, as a graph that the host trains and runs; only
//! the team's rules run as Wasm: `rank` for requests, `labels`, `sample` and `schedule` in
//! training, `evaluate` before a publication. See `examples/hello-expert` for the
//! smallest one, `plugins/value-model` for one that uses them all. This crate runs no network and knows no host: what it may ask
//! for is in the contract, `sdk/wit/expert.wit`.

mod component;
mod description;
pub mod evaluate;
mod expert_fusion;
mod fusion;
mod graph;
mod heads;
mod hstu;
pub mod labels;
mod layers;
pub mod log;
mod ops;
mod rank;
pub mod raw;
mod shape;

pub use component::{Component, build};
pub use description::Description;
pub use expert_fusion::{Cross, ExpertFusion};
pub use fusion::{FmEmbedded, FmEmbedding, FmFusion};
pub use graph::{Finished, Graph, Tensor};
pub use heads::{PerSurface, TaskHeads};
pub use hstu::Hstu;
pub use layers::{Dropout, Embedding, LayerNorm, Linear, Mlp, RmsNorm, Squash};
pub use ops::{Attention, Projections};
pub use rank::{Diversity, Request};
pub use raw::types::{
    ActionBatch, Column, Decision, Evaluation, HostInfo, Initialiser, Outcome, Prediction, Quality,
    Ranked, SchemaTask, Slice, Task, TaskKind, TaskLabels, TrainingStep, Verdict,
};
pub use shape::{Dim, Shape};

/// An expert. Every call may run in a fresh instance, so there is no state to keep.
pub trait Expert {
    /// Its name, version, tasks and limits, for the host's schema.
    fn describe(info: &HostInfo) -> Description;

    /// Its network: read columns of `g`, apply layers, and give each task an `output`.
    ///
    /// A mistake in a shape or a name is kept and reported with its layer's path; `g.fail` adds one's own.
    fn network(g: &Graph);

    /// The final order of a request's candidates, at most `request.limit` of them, each at most once.
    /// By the first task's prediction unless written otherwise.
    ///
    /// # Errors
    /// An error is a fault of this request: the host answers with the FM's own ranking.
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let first =
            request.predictions().first().ok_or("rank: the expert has no task to rank by")?;
        Ok(request.top(&first.values))
    }

    /// The labels, sample space and weights of a batch of training examples, a task each.
    /// By the schema's tasks unless written otherwise (see [`labels::from_schema`]).
    ///
    /// # Errors
    /// An error stops the expert's training.
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        labels::from_schema(&Self::describe(info).tasks, info, batch)
    }

    /// The probability with which each example is kept for training; empty keeps all.
    ///
    /// The host weighs those that are kept by its inverse, so predictions stay calibrated; metrics count every example.
    fn sample(_info: &HostInfo, _batch: &ActionBatch) -> Vec<f32> {
        Vec::new()
    }

    /// A factor of a training step's learning rate, from 0 to 10, beside the warm-up and decay that the host has.
    fn schedule(_step: &TrainingStep) -> f32 {
        1.0
    }

    /// Whether what was trained may serve. Unless written otherwise no task's NE may be worse than that of what serves
    /// (see [`evaluate::NoWorse`]).
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        evaluate::NoWorse::default().judge(evaluation)
    }
}

/// Makes the crate a component whose expert is the named type. Once a crate, which must be a `cdylib`.
#[macro_export]
macro_rules! export {
    ($expert:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type Component = $crate::Component<$expert>;
    $crate::raw::export_expert_world!(Component with_types_in $crate::raw);
        };
        // A native build, as for unit tests, exports nothing but checks the type.
        #[cfg(not(target_arch = "wasm32"))]
        const _: fn(&$crate::HostInfo) -> $crate::Description =
            <$expert as $crate::Expert>::describe;
    };
}
