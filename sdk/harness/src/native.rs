//! Runs the SDK's trait in this process. A debugger can stop in it, a panic has a backtrace, and no
//! component has to be built.
//!
//! `describe`, `network`, `rank` and the training hooks are plain function calls. The host's own
//! code checks and runs the graph, as for a component. Unlike a component, a native expert has no
//! deadline and no memory limit, and does not get a fresh instance for each call.

use std::marker::PhantomData;
use std::sync::Arc;

use hypercast_expert::Blueprint;
use hypercast_expert::graph::ExpertGraph;
use hypercast_sdk::{Expert, HostInfo, Request, Task};

use crate::contract::{
    ActionBatch, Evaluation, EvaluationRows, HostSchema, Ranked, TaskLabels, TrainingStep, Verdict,
};
use crate::convert;
use crate::error::Error;
use crate::harness::Harness;
use crate::runtime::{ExpertCode, RankCall};
use crate::world::World;

/// A native expert, and the schema that it is told.
pub(crate) struct NativeCode<E> {
    info: HostInfo,
    expert: PhantomData<E>,
}

impl<E: Expert + 'static> NativeCode<E> {
    /// Builds the expert's network and checks it as the host does.
    pub(crate) fn load(world: &World) -> Result<Harness, Error> {
        let (schema, vectors) = (world.schema(), world.options.vectors());
        let core = convert::info(&HostSchema::new(schema, vectors).info);
        // An expert of one surface is told what belongs to that, as a component is.
        let host = match E::describe(&core).served() {
            [one] => HostSchema::on(Some(one), schema, vectors),
            _ => HostSchema::new(schema, vectors),
        };
        let info = convert::info(&host.info);
        let (description, network) = hypercast_sdk::build::<E>(&info).map_err(Error::Network)?;
        let network = convert::network(network);
        let description = convert::description(description).map_err(Error::Network)?;
        let limits = &world.options.graph_limits;
        let graph = Arc::new(ExpertGraph::new(&description, &network, &host, limits)?);
        let code = NativeCode::<E> { info, expert: PhantomData };
        Harness::new(world, description, host.info, graph, Arc::new(code))
    }
}

impl<E: Expert + 'static> ExpertCode for NativeCode<E> {
    fn rank(&self, call: &RankCall) -> Result<Vec<Ranked>, String> {
        let RankCall { request, predictions, columns } = call;
        let request = Request::new(
            convert::rank_request(request),
            convert::predictions(predictions),
            convert::columns(columns),
        );
        E::rank(&request).map(convert::ranked)
    }

    fn rank_twice(&self, call: &RankCall) -> Result<[Vec<Ranked>; 2], String> {
        Ok([self.rank(call)?, self.rank(call)?])
    }

    fn labels(&self, batch: &ActionBatch) -> Result<Vec<TaskLabels>, String> {
        E::labels(&self.info, &convert::action_batch(batch)).map(convert::labels)
    }

    fn weights(&self, batch: &ActionBatch) -> Result<Vec<Vec<f32>>, String> {
        let weights = E::weights(&self.info, &convert::action_batch(batch))?;
        let of_task = |task: &Task| {
            let own = weights.iter().find(|own| own.task == task.name);
            own.map_or_else(Vec::new, |own| own.weights.clone())
        };
        Ok(E::describe(&self.info).tasks().iter().map(of_task).collect())
    }

    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String> {
        Ok(E::sample(&self.info, &convert::action_batch(batch)))
    }

    fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        Ok(E::schedule(&convert::step(step)))
    }

    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        Ok(convert::verdict(E::evaluate(&self.info, &convert::evaluation(evaluation))))
    }

    fn evaluate_rows(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Verdict, String> {
        let (evaluation, rows) = (convert::evaluation(evaluation), convert::evaluation_rows(rows));
        Ok(convert::verdict(E::evaluate_rows(&self.info, &evaluation, &rows)))
    }

    fn validation_score(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, String> {
        let (evaluation, rows) = (convert::evaluation(evaluation), convert::evaluation_rows(rows));
        E::validation_score(&self.info, &evaluation, &rows)
    }

    fn load(&self, world: &World) -> Result<Harness, Error> {
        NativeCode::<E>::load(world)
    }

    fn blueprint(&self) -> Option<&Arc<Blueprint>> {
        None
    }
}
