//! An expert of the search page whose `rank` reads every column that a host offers to it, and
//! explores: the most that crosses the contract in a call. It is not hostile.
//!
//! `rank` reads whatever columns it is sent, so that a bench can send it fewer.

use hypercast_sdk::raw::types::{
    Data, Description as WitDescription, NamedColumn, Network, RankRequest,
};
use hypercast_sdk::raw::{Guest, export_expert_world};
use hypercast_sdk::{
    ActionBatch, Component, Description, Evaluation, Expert, Graph, HostInfo, Prediction, Ranked,
    Request, TaskLabels, TrainingStep, Verdict,
};

/// All of it but `rank`.
struct Declares;

impl Expert for Declares {
    fn describe(info: &HostInfo) -> Description {
        let own = hypercast_hostile::describe("every_column", info).surfaces(["search"]);
        let own = info.features.iter().fold(own, |own, name| own.rank_feature(name));
        let own = info.own_features().fold(own, |own, name| own.rank_feature(name));
        let own = info.ids.iter().fold(own, |own, name| own.rank_id(name));
        let own = info.own_ids().fold(own, |own, name| own.rank_id(name));
        let own = info.vectors().fold(own, |own, (name, _)| own.rank_vector(name));
        let own = info.fm_logits().fold(own, |own, task| own.rank_fm_logit(task));
        if info.tae_dim > 0 { own.rank_tae() } else { own }
    }

    fn network(g: &Graph) {
        hypercast_hostile::network(g);
    }
}

struct EveryColumn;

impl Guest for EveryColumn {
    fn describe(info: HostInfo) -> WitDescription {
        <Component<Declares> as Guest>::describe(info)
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        <Component<Declares> as Guest>::network(info)
    }

    /// The sum of all predictions and numbers, of a row of several the first, and of the last four
    /// bits of ids; one request of twenty at random.
    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        let rows = request.candidates.len();
        let mut scores = vec![0.0f32; rows];
        for Prediction { values, .. } in &predictions {
            scores.iter_mut().zip(values).for_each(|(score, value)| *score += value);
        }
        for NamedColumn { data, .. } in &columns {
            match data {
                Data::Numbers(values) => {
                    let each = values.iter().step_by((values.len() / rows).max(1));
                    scores.iter_mut().zip(each).for_each(|(score, value)| *score += value);
                }
                Data::Ids(ids) => {
                    scores.iter_mut().zip(ids).for_each(|(score, id)| *score += (id % 16) as f32);
                }
                Data::Integers(_) => return Err("integers, which no column of `rank` has".into()),
            }
        }
        Ok(Request::new(request, predictions, columns).epsilon_greedy(&scores, 0.05))
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        <Component<Declares> as Guest>::labels(info, batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        <Component<Declares> as Guest>::sample(info, batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        <Component<Declares> as Guest>::schedule(step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        <Component<Declares> as Guest>::evaluate(info, evaluation)
    }
}

export_expert_world!(EveryColumn with_types_in hypercast_sdk::raw);
