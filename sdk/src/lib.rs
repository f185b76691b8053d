//! The guest side of the expert contract: the library that a surface team writes an expert with.
//!
//! An expert is a type that implements [`Expert`] and is passed to [`export!`]. The host calls
//! `network` once, at load, and from then on trains and runs the resulting graph itself. Only the
//! team's rules run as Wasm: `rank` for each request, `labels`, `weights`, `sample` and `schedule`
//! during training, and `evaluate` or `evaluate_rows` before a publication.
//!
//! This crate does not execute networks and does not depend on the host. Everything that crosses
//! the boundary between the two is defined in the contract, `sdk/wit/expert.wit`.
//!
//! ```text
//! Description      who the expert is: name, tasks, surfaces, limits
//! Graph, Tensor    the network under construction, with the ops of sdk/wit/ops.md
//! layers           Linear, Mlp, Embedding, ...; Hstu, FmEmbedding, FmFusion, ExpertFusion, Cross,
//!                  TaskHeads; Trees, the leaves of boosted trees
//! losses           losses of a task in place of the host's: focal, quantile, listwise and others
//! Request          what `rank` receives, with helpers to score, order and explore candidates
//! Slate            its candidates under filters and caps, and the rules that order them: by score,
//!                  by chance (epsilon-greedy, softmax, Thompson), or for diversity (MMR, DPP)
//! ActionBatch      what the training hooks receive: outcomes, and the columns they declare
//! EvaluationRows   rows with predictions, for metrics of the team's own (`ndcg`)
//! labels, evaluate the default training hooks, for experts that extend them
//! log              log lines to the host
//! raw              the generated bindings, for components that implement the contract by hand
//! ```
//!
//! The smallest expert puts one linear layer per task on the FM's target-aware embedding:
//!
//! ```
//! use hypercast_sdk::{Description, Expert, Graph, HostInfo, Linear, SchemaTask, TaskKind};
//!
//! struct Hello;
//!
//! impl Expert for Hello {
//!     fn describe(info: &HostInfo) -> Description {
//!         Description::new("hello", "1.0.0").all_tasks(info)
//!     }
//!
//!     fn network(g: &Graph) {
//!         for task in g.tasks() {
//!             g.output(&task.name, Linear::new(&task.name, 1).apply(g.tae()));
//!         }
//!     }
//! }
//!
//! hypercast_sdk::export!(Hello);
//!
//! // A test can ask for what the host would receive at load.
//! let click = SchemaTask {
//!     name: "click".into(),
//!     kind: TaskKind::Binary,
//!     label: "click".into(),
//!     surfaces: vec![],
//! };
//! let info = HostInfo {
//!     tae_dim: 16,
//!     surfaces: vec!["feed".into()],
//!     actions: vec!["click".into()],
//!     tasks: vec![click],
//!     ..HostInfo::default()
//! };
//! let (description, network) = hypercast_sdk::build::<Hello>(&info)?;
//! assert_eq!(description.name, "hello");
//! assert_eq!(network.outputs[0].task, "click");
//! # Ok::<(), String>(())
//! ```
//!
//! `examples/hello-expert` is this expert as a crate; `plugins/value-model` uses every hook.

mod columns;
mod component;
mod description;
mod diversity;
pub mod evaluate;
mod expert_fusion;
mod explore;
mod fusion;
mod graph;
mod heads;
mod hstu;
pub mod labels;
mod layers;
pub mod log;
pub mod losses;
mod normal;
mod ops;
mod rank;
pub mod raw;
mod segment;
mod shape;
mod slate;
mod trees;

pub use component::{Component, build};
pub use description::Description;
pub use expert_fusion::{Cross, ExpertFusion};
pub use explore::Chance;
pub use fusion::{FmEmbedded, FmEmbedding, FmFusion};
pub use graph::{Finished, Graph, Optimiser, Tensor};
pub use heads::{PerSurface, TaskHeads};
pub use hstu::Hstu;
pub use layers::{Dropout, Embedding, LayerNorm, Linear, Mlp, RmsNorm, Squash};
pub use ops::{Attention, Projections};
pub use rank::{Diversity, Request};
pub use raw::types::{
    ActionBatch, Column, Data, Decision, Evaluation, EvaluationRows, HostInfo, Initialiser,
    NamedColumn, OfferedColumn, Outcome, Prediction, Quality, RankRequest, Ranked, SchemaTask,
    ScoredTask, Slice, Task, TaskKind, TaskLabels, TaskWeights, TrainingStep, Verdict,
};
pub use segment::PairwiseFunction;
pub use shape::{Dim, Shape};
pub use slate::{Cap, Filtered, Slate};
pub use trees::Trees;

/// An expert. Each call may run in a fresh instance, so an expert cannot keep state between calls.
pub trait Expert {
    /// Returns the expert's name, version, tasks and limits for a host with this schema.
    fn describe(info: &HostInfo) -> Description;

    /// Builds the network: reads columns from `g`, applies layers and sets one `output` per task.
    ///
    /// The graph records the first wrong shape or name and reports it with the path of its layer.
    /// Call `g.fail` to report a mistake of your own.
    fn network(g: &Graph);

    /// Returns the final order of a request's candidates: at most `request.limit` of them, each at
    /// most once. The default orders by the prediction of the first task.
    ///
    /// # Errors
    /// The host counts an error as a fault and answers this request with the FM's own ranking.
    fn rank(request: &Request) -> Result<Vec<Ranked>, String> {
        let first =
            request.predictions().first().ok_or("rank: the expert has no task to rank by")?;
        Ok(request.top(&first.values))
    }

    /// Returns the labels, masks and weights of a batch of training examples, one entry per task.
    /// The default follows the schema's tasks (see [`labels::from_schema`]). `batch` also has the
    /// columns that the description declares for it (`Description::training_feature` and others).
    ///
    /// # Errors
    /// An error stops the expert's training.
    fn labels(info: &HostInfo, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        labels::from_schema(&Self::describe(info).0.tasks, info, batch)
    }

    /// Returns loss weights for a batch of training examples, by which those of `labels` are
    /// multiplied: one entry for each task that has any. The default has none. So an expert whose
    /// labels are the schema's writes its weights alone (see [`ActionBatch::weighted`]).
    ///
    /// # Errors
    /// As `labels`.
    fn weights(_info: &HostInfo, _batch: &ActionBatch) -> Result<Vec<TaskWeights>, String> {
        Ok(Vec::new())
    }

    /// Returns the probability of keeping each example for training. An empty list keeps all.
    ///
    /// The host weights each kept example by the inverse of its probability, so predictions stay
    /// calibrated. Metrics count every example, whether kept or not.
    fn sample(_info: &HostInfo, _batch: &ActionBatch) -> Vec<f32> {
        Vec::new()
    }

    /// Returns a factor from 0 to 10 for the learning rate of a training step. The host applies it
    /// on top of its own warm-up and decay.
    fn schedule(_step: &TrainingStep) -> f32 {
        1.0
    }

    /// Decides whether newly trained parameters may serve. By default, the NE of each task must not
    /// be worse than that of the serving version (see [`evaluate::NoWorse`]).
    fn evaluate(_info: &HostInfo, evaluation: &Evaluation) -> Verdict {
        evaluate::NoWorse::default().judge(evaluation)
    }

    /// Decides the same where there are rows: in trainers, before a publication. A daemon that
    /// decides about a canary has none and calls `evaluate`, which the default does, too; so does a
    /// trainer that was started anew, until it has learned from a request.
    fn evaluate_rows(info: &HostInfo, evaluation: &Evaluation, _rows: &EvaluationRows) -> Verdict {
        Self::evaluate(info, evaluation)
    }

    /// Returns how good a pass over logs was, higher is better, where the description says
    /// [`Description::early_stop`]: by predictions for rows that no pass learns from, of which
    /// `evaluation` has the figures and `rows` whole requests, a few MiB. The default leaves it to
    /// the host, which takes the mean NE of the tasks.
    ///
    /// # Errors
    /// An error ends the training.
    fn validation_score(
        _info: &HostInfo,
        _evaluation: &Evaluation,
        _rows: &EvaluationRows,
    ) -> Result<Option<f64>, String> {
        Ok(None)
    }
}

/// The examples of the author's guide, compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Guide;

/// Exports an expert as this crate's component. Call it once, in a crate of type `cdylib`.
#[macro_export]
macro_rules! export {
    ($expert:ty) => {
        #[cfg(target_arch = "wasm32")]
        const _: () = {
            type ExportedExpert = $crate::Component<$expert>;
    $crate::raw::export_expert_world!(ExportedExpert with_types_in $crate::raw);
    $crate::raw::hooks::export_training_hooks!(ExportedExpert with_types_in $crate::raw::hooks);
        };
        // A native build (for unit tests) exports nothing, but still checks the type.
        #[cfg(not(target_arch = "wasm32"))]
        const _: fn(&$crate::HostInfo) -> $crate::Description =
            <$expert as $crate::Expert>::describe;
    };
}
