//! Guests that misbehave, for the host's tests: the parts of them that behave.
//!
//! Each example is one component with one fault. Everything else of it is a valid
//! expert for any schema and surface, so that a test can put it beside good ones.

use std::marker::PhantomData;

use hypercast_sdk::raw::types::{Description as WitDescription, NamedColumn, Network, RankRequest};
use hypercast_sdk::raw::{Guest, types};
use hypercast_sdk::{
    ActionBatch, Component, Description, Evaluation, Expert, Graph, HostInfo, Linear, Prediction,
    Ranked, TaskLabels, TrainingStep, Verdict,
};

/// A description without fault.
pub fn describe(name: &str, info: &HostInfo) -> Description {
    Description::new(name, "1.0.0").all_tasks(info)
}

/// A network without fault: a linear head a task.
pub fn network(g: &Graph) {
    let input = if g.info().tae_dim > 0 { g.tae() } else { g.features(&g.info().features) };
    for task in g.tasks() {
        g.output(&task.name, Linear::new(&task.name, 1).apply(input));
    }
}

/// An expert without fault.
pub struct Good;

impl Expert for Good {
    fn describe(info: &HostInfo) -> Description {
        describe("good", info)
    }

    fn network(g: &Graph) {
        network(g);
    }
}

/// A fault in a description or network that no builder would make.
pub trait Mutation {
    /// The expert's name.
    const NAME: &'static str;

    /// Spoils a valid description.
    fn describe(_description: &mut WitDescription) {}

    /// Spoils a valid network.
    fn mutate(_network: &mut Network) {}
}

/// An expert whose description or network has the fault of `M`.
pub struct Mutant<M>(PhantomData<M>);

impl<M: Mutation> Guest for Mutant<M> {
    fn describe(info: HostInfo) -> WitDescription {
        let mut description = <Component<Good> as Guest>::describe(info);
        description.name = M::NAME.into();
        M::describe(&mut description);
        description
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        let mut network = <Component<Good> as Guest>::network(info)?;
        M::mutate(&mut network);
        Ok(network)
    }

    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        <Component<Good> as Guest>::rank(request, predictions, columns)
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        <Component<Good> as Guest>::labels(info, batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        <Component<Good> as Guest>::sample(info, batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        <Component<Good> as Guest>::schedule(step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        <Component<Good> as Guest>::evaluate(info, evaluation)
    }
}

/// A node of an op and its inputs, for mutations.
pub fn node(op: &str, inputs: &[u32]) -> types::Node {
    types::Node {
        op: op.into(),
        inputs: inputs.to_vec(),
        attributes: Vec::new(),
        layer: "hostile".into(),
    }
}
