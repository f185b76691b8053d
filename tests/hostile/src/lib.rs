//! Hostile guests for the host's tests: the parts of them that are valid.
//!
//! Each example of this crate is one component with one fault. Everything else about it is a valid
//! expert for any schema and surface, so a test can load it next to good ones. The macros
//! [`hostile_expert!`] and [`hostile_mutant!`] define and export such an expert. Its name is that
//! of the example.
//!
//! Thirteen have no fault: `earlier_contract` is of contract 2, `search_team` serves one surface
//! and reads what belongs to it, `content_vector`, `explorer`, `fm_residual` and `patient` do what
//! no plugin of this repository does, `dlrm` was made of a model in ONNX, and `every_column` reads
//! all that `rank` can for `hypercast-lab bench expert`. `pointwise`, `listwise` and `distilled`
//! are one network that learns by three losses, for `hypercast-lab evaluate --expert
//! pointwise.wasm --rival listwise.wasm` and `experiment transfer --expert pointwise --student
//! distilled`; `complete` and `without_cross` are for `experiment ablation --expert complete
//! --variant without_cross`.

use std::marker::PhantomData;

use hypercast_sdk::raw::types::{Description as WitDescription, NamedColumn, Network, RankRequest};
use hypercast_sdk::raw::{Guest, types};
use hypercast_sdk::{
    ActionBatch, Component, Description, Dropout, Embedding, Evaluation, Expert, ExpertFusion,
    FmEmbedding, FmFusion, Graph, HostInfo, Hstu, Linear, Prediction, Ranked, Squash, TaskHeads,
    TaskLabels, Tensor, TrainingStep, Verdict,
};

/// A description that the host accepts.
pub fn describe(name: &str, info: &HostInfo) -> Description {
    Description::new(name, "1.0.0").all_tasks(info)
}

/// A valid network: one linear layer per task.
pub fn network(g: &Graph) {
    let input = if g.info().tae_dim > 0 { g.tae() } else { g.features(&g.info().features) };
    for task in g.tasks() {
        g.output(&task.name, Linear::new(&task.name, 1).apply(input));
    }
}

/// Sets a logit for each task: a network that ranks, of all features, ids and the FM's embedding.
pub fn ranking_network(g: &Graph, mut each: impl FnMut(&str, Tensor<'_>)) {
    let mut heads = TaskHeads::new("heads");
    let ids = g.info().ids.iter().filter(|id| *id != "user_id");
    let embed = |id: &String| Embedding::new(&format!("embed_{id}"), 5_000, 8).apply(g.id(id));
    let mut parts: Vec<Tensor> = ids.map(embed).collect();
    if !g.info().features.is_empty() {
        let numbers = g.features(&g.info().features);
        parts.push(Squash::new("numeric").apply(numbers));
        heads = heads.direct(numbers);
    }
    if g.info().tae_dim > 0 {
        let fm = FmEmbedding::new("fm", 32).apply(g.tae());
        parts.push(fm.values);
        heads = heads.fm(fm);
    }
    let bottom = ExpertFusion::mlp("expert", [64, 32]).dropout(0.1).apply(g.concat(&parts));
    for task in g.tasks() {
        let logit = heads.logit(&task.name, bottom);
        g.output(&task.name, logit);
        each(&task.name, logit);
    }
}

/// Sets a logit for each task: a network of all that the host offers, with a sequence model of the
/// user's last events, and heads that begin at the FM's predictions.
pub fn complete_network<'g>(g: &'g Graph, fusion: ExpertFusion<'g>) {
    let info = g.info();
    let ids = info.ids.iter().filter(|id| *id != "user_id");
    let table = |id: &String| Embedding::new(&format!("embed_{id}"), 5_000, 12);
    let tables: Vec<(&str, Embedding)> = ids.map(|id| (id.as_str(), table(id))).collect();
    let in_history = |id: &str| id != "surface" && info.history_ids.iter().any(|own| own == id);
    let shared = tables.iter().filter(|(id, _)| in_history(id));
    let shared: Vec<_> = shared.map(|(id, table)| (*id, table)).collect();
    let hstu = || Hstu::new("short", 32).heads(2).dropout(0.1).apply(g, &shared);
    let short = (!shared.is_empty()).then(hstu);
    let embedded: Vec<_> = tables.iter().map(|(id, table)| table.apply(g.id(id))).collect();
    let mut parts = vec![Dropout::new(0.1).apply(g.concat(&embedded))];
    let mut heads = TaskHeads::new("heads");
    if !info.features.is_empty() {
        let numbers = g.features(&info.features);
        parts.push(Squash::new("numeric").apply(numbers));
        heads = heads.direct(numbers);
    }
    let vectors = info.vectors();
    parts.extend(vectors.map(|(name, _)| Linear::new(name, 16).apply(g.vector(name))));
    if info.tae_dim > 0 {
        let fm = FmEmbedding::new("fm", 32).value_dropout(0.0).apply(g.tae());
        parts.extend([fm.values, FmFusion::new("fusion", 32).apply(fm, short)]);
        heads = heads.fm(fm).from_fm();
    } else {
        parts.extend(short);
    }
    heads.apply(g, fusion.dropout(0.2).apply(g.concat(&parts)));
}

/// An expert that the host accepts.
pub struct ValidExpert;

impl Expert for ValidExpert {
    fn describe(info: &HostInfo) -> Description {
        describe("valid", info)
    }

    fn network(g: &Graph) {
        network(g);
    }
}

/// A fault in a description or network that the SDK's builders would not produce.
pub trait Mutation {
    /// The name of the expert.
    const NAME: &'static str;

    /// Adds a fault to a valid description.
    fn describe(_description: &mut WitDescription) {}

    /// Adds a fault to a valid network.
    fn mutate(_network: &mut Network) {}
}

/// An expert whose description or network has the fault of `M`.
pub struct Mutant<M>(PhantomData<M>);

impl<M: Mutation> Guest for Mutant<M> {
    fn describe(info: HostInfo) -> WitDescription {
        let mut description = <Component<ValidExpert> as Guest>::describe(info);
        description.name = M::NAME.into();
        M::describe(&mut description);
        description
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        let mut network = <Component<ValidExpert> as Guest>::network(info)?;
        M::mutate(&mut network);
        Ok(network)
    }

    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        <Component<ValidExpert> as Guest>::rank(request, predictions, columns)
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        <Component<ValidExpert> as Guest>::labels(info, batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        <Component<ValidExpert> as Guest>::sample(info, batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        <Component<ValidExpert> as Guest>::schedule(step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        <Component<ValidExpert> as Guest>::evaluate(info, evaluation)
    }
}

/// Exports an expert that is valid except for the given methods of `Expert`.
#[macro_export]
macro_rules! hostile_expert {
    ($($methods:tt)*) => {
        struct HostileExpert;

        impl hypercast_sdk::Expert for HostileExpert {
            fn describe(info: &hypercast_sdk::HostInfo) -> hypercast_sdk::Description {
                $crate::describe(env!("CARGO_CRATE_NAME"), info)
            }

            fn network(g: &hypercast_sdk::Graph) {
                $crate::network(g);
            }

            $($methods)*
        }

        hypercast_sdk::export!(HostileExpert);
    };
}

/// Exports a valid expert with a fault in its description or network: the given methods of
/// [`Mutation`].
#[macro_export]
macro_rules! hostile_mutant {
    ($($methods:tt)*) => {
        struct HostileMutation;

        impl $crate::Mutation for HostileMutation {
            const NAME: &'static str = env!("CARGO_CRATE_NAME");

            $($methods)*
        }

        type MutantComponent = $crate::Mutant<HostileMutation>;
        hypercast_sdk::raw::export_expert_world!(MutantComponent with_types_in hypercast_sdk::raw);
    };
}

/// A node with an op and its inputs, for mutations.
pub fn node(op: &str, inputs: &[u32]) -> types::Node {
    types::Node {
        op: op.into(),
        inputs: inputs.to_vec(),
        attributes: Vec::new(),
        layer: "hostile".into(),
    }
}
