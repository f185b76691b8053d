//! Runs the SDK's trait in this process. A debugger can stop in it, a panic has a backtrace, and no
//! component has to be built.
//!
//! `describe`, `network`, `rank` and the training hooks are plain function calls. The host's own
//! code checks and runs the graph, as for a component. Unlike a component, a native expert has no
//! deadline and no memory limit, and does not get a fresh instance for each call.

use std::marker::PhantomData;
use std::sync::Arc;

use hypercast_expert::batch::ExpertColumns;
use hypercast_expert::graph::ExpertGraph;
use hypercast_expert::network::{ServingNetwork, network};
use hypercast_expert::params::hash_text;
use hypercast_expert::{Device, ExpertPredictions, Parameters, Provenance};
use hypercast_sdk::{Expert, Request};

use crate::cases::Case;
use crate::contract::{
    self, ActionBatch, Description, Evaluation, HostInfo, NamedColumn, Prediction, Ranked,
    TaskKind, TaskLabels, TrainingStep, Verdict,
};
use crate::convert;
use crate::error::Error;
use crate::runtime::{RankCall, Runtime};
use crate::training;
use crate::world::World;

/// A native expert and its parameters.
pub(crate) struct NativeRuntime<E> {
    world: World,
    description: Description,
    info: HostInfo,
    graph: Arc<ExpertGraph>,
    columns: ExpertColumns,
    network: Box<dyn ServingNetwork>,
    parameters: Parameters,
    expert: PhantomData<E>,
}

impl<E: Expert + 'static> NativeRuntime<E> {
    pub(crate) fn load(world: &World) -> Result<Self, Error> {
        let info = contract::host_info(world.schema(), world.options.tae_dim);
        let (description, network) =
            hypercast_sdk::build::<E>(&convert::info(&info)).map_err(Error::Network)?;
        let (description, network) = (convert::description(description), convert::network(network));
        let limits = &world.options.graph_limits;
        let graph = Arc::new(ExpertGraph::new(&description, &network, &info, limits)?);
        let provenance = Provenance {
            plugin: description.name.clone(),
            plugin_version: description.version.clone(),
            contract: contract::VERSION.into(),
            graph: hash_text(&graph),
            fm_version: world.options.fm_version.clone().unwrap_or_default(),
            tae_dim: world.options.tae_dim,
            tasks: description.tasks.iter().map(|task| task.name.clone()).collect(),
            trained_rows: 0,
            trained_until_ms: 0,
            normaliser: training::normaliser(world),
        };
        let parameters = Parameters::init(&graph, provenance, training::SEED);
        let parameters = training::shaken(parameters, &graph);
        Self::new(world, description, info, graph, parameters)
    }

    fn new(
        world: &World,
        description: Description,
        info: HostInfo,
        graph: Arc<ExpertGraph>,
        parameters: Parameters,
    ) -> Result<Self, Error> {
        Ok(NativeRuntime {
            columns: ExpertColumns::new(&description, world.schema(), world.options.tae_dim)?,
            network: network(graph.clone(), parameters.clone(), Device::Cpu)?,
            world: world.clone(),
            description,
            info,
            graph,
            parameters,
            expert: PhantomData,
        })
    }
}

impl<E: Expert + 'static> Runtime for NativeRuntime<E> {
    fn description(&self) -> &Description {
        &self.description
    }

    fn info(&self) -> &HostInfo {
        &self.info
    }

    fn graph(&self) -> &Arc<ExpertGraph> {
        &self.graph
    }

    fn rank_columns(&self, case: &Case) -> Vec<NamedColumn> {
        self.columns.rank_columns(&case.example, case.tae())
    }

    fn predict(&self, case: &Case) -> Result<ExpertPredictions, String> {
        let normaliser = &self.parameters.provenance.normaliser;
        let batch = self.columns.batch(&[&case.example], case.tae(), normaliser);
        let outputs = if batch.rows == 0 { Vec::new() } else { self.network.outputs(&batch) };
        let tasks = &self.description.tasks;
        let values = |at: usize| {
            let outputs = outputs.iter().skip(at).step_by(tasks.len());
            outputs.map(|output| prediction(tasks[at].kind, *output)).collect()
        };
        let one = |at: usize| Prediction { task: tasks[at].name.clone(), values: values(at) };
        Ok(ExpertPredictions { tasks: (0..tasks.len()).map(one).collect() })
    }

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
        E::labels(&convert::info(&self.info), &convert::action_batch(batch)).map(convert::labels)
    }

    fn sample(&self, batch: &ActionBatch) -> Result<Vec<f32>, String> {
        Ok(E::sample(&convert::info(&self.info), &convert::action_batch(batch)))
    }

    fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        Ok(E::schedule(&convert::step(step)))
    }

    fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        let verdict = E::evaluate(&convert::info(&self.info), &convert::evaluation(evaluation));
        Ok(convert::verdict(verdict))
    }

    fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn with_parameters(&self, parameters: Parameters) -> Result<Box<dyn Runtime>, Error> {
        let (description, info) = (self.description.clone(), self.info.clone());
        let graph = self.graph.clone();
        Ok(Box::new(Self::new(&self.world, description, info, graph, parameters)?))
    }

    fn reloaded(&self) -> Result<Box<dyn Runtime>, Error> {
        Self::load(&self.world)?.with_parameters(self.parameters.clone())
    }
}

fn prediction(kind: TaskKind, output: f32) -> f32 {
    match kind {
        TaskKind::Binary => 1.0 / (1.0 + (-output).exp()),
        TaskKind::Regression => output,
    }
}
