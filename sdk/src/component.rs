//! Implements the contract's functions for every type that implements `Expert`.

use std::marker::PhantomData;

use crate::raw::types::{
    self as wit, ActionBatch, Evaluation, EvaluationRows, HostInfo, NamedColumn, Network,
    Prediction, RankRequest, Ranked, TaskLabels, TaskWeights, TrainingStep, Verdict,
};
use crate::{Expert, Finished, Graph, Request, log, raw};

/// Adapts an [`Expert`] to the contract's exports. `export!` uses it.
pub struct Component<E>(PhantomData<E>);

// Each call may be the first of its instance, so each sees to it that a panic is reported.
impl<E: Expert> raw::Guest for Component<E> {
    fn describe(info: HostInfo) -> wit::Description {
        log::report_panics();
        let description = E::describe(&info);
        // The columns follow from the network. If it cannot be built, there are none, and the host
        // gets the reason from `network`.
        let columns = finish::<E>(info).map(|finished| finished.columns).unwrap_or_default();
        wit::Description { columns, ..description.0 }
    }

    fn network(info: HostInfo) -> Result<Network, String> {
        log::report_panics();
        Ok(finish::<E>(info)?.network)
    }

    fn rank(
        request: RankRequest,
        predictions: Vec<Prediction>,
        columns: Vec<NamedColumn>,
    ) -> Result<Vec<Ranked>, String> {
        log::report_panics();
        E::rank(&Request::new(request, predictions, columns))
    }

    fn labels(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskLabels>, String> {
        log::report_panics();
        E::labels(&info, &batch)
    }

    fn sample(info: HostInfo, batch: ActionBatch) -> Vec<f32> {
        log::report_panics();
        E::sample(&info, &batch)
    }

    fn schedule(step: TrainingStep) -> f32 {
        log::report_panics();
        E::schedule(&step)
    }

    fn evaluate(info: HostInfo, evaluation: Evaluation) -> Verdict {
        log::report_panics();
        E::evaluate(&info, &evaluation)
    }
}

impl<E: Expert> raw::hooks::Guest for Component<E> {
    fn weights(info: HostInfo, batch: ActionBatch) -> Result<Vec<TaskWeights>, String> {
        log::report_panics();
        E::weights(&info, &batch)
    }

    fn evaluate_rows(info: HostInfo, evaluation: Evaluation, rows: EvaluationRows) -> Verdict {
        log::report_panics();
        E::evaluate_rows(&info, &evaluation, &rows)
    }

    fn validation_score(
        info: HostInfo,
        evaluation: Evaluation,
        rows: EvaluationRows,
    ) -> Result<Option<f64>, String> {
        log::report_panics();
        E::validation_score(&info, &evaluation, &rows)
    }
}

/// Returns the description and network that the host would receive at load, for a plugin's tests.
///
/// # Errors
/// The first mistake in the network, with the path of its layer.
pub fn build<E: Expert>(info: &HostInfo) -> Result<(wit::Description, Network), String> {
    let Finished { network, columns } = finish::<E>(info.clone())?;
    Ok((wit::Description { columns, ..E::describe(info).0 }, network))
}

fn finish<E: Expert>(info: HostInfo) -> Result<Finished, String> {
    let description = E::describe(&info);
    let graph = Graph::new(info, &description);
    E::network(&graph);
    graph.finish()
}
