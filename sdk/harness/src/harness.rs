//! An expert in a world, with the calls that a test can make.

use std::path::Path;
use std::sync::Arc;

use hypercast_expert::batch::{ExpertColumns, GuestRequest};
use hypercast_expert::graph::ExpertGraph;
use hypercast_expert::network::{ServingNetwork, network};
use hypercast_expert::wasm::LogLine;
use hypercast_expert::{Device, ExpertPredictions, Parameters, Provenance, SavedParameters};
use hypercast_sdk::Expert;

use crate::cases::Case;
use crate::contract::{
    self, ActionBatch, Description, Evaluation, EvaluationRows, HostInfo, Prediction, Ranked,
    ScoredTask, TaskLabels, TrainingStep, Verdict,
};
use crate::error::{Error, FailureLocation};
use crate::runtime::{ExpertCode, RankCall};
use crate::training::{self, TrainingResult};
use crate::world::World;

/// An expert under test. Its parameters are random, unless set by [`Harness::trained`] or
/// [`Harness::parameters`].
#[derive(Clone)]
pub struct Harness {
    pub(crate) world: World,
    description: Description,
    pub(crate) info: HostInfo,
    pub(crate) graph: Arc<ExpertGraph>,
    columns: ExpertColumns,
    network: Arc<dyn ServingNetwork>,
    parameters: Parameters,
    pub(crate) code: Arc<dyn ExpertCode>,
    /// Whether a ranking may leave candidates out.
    pub(crate) drops: bool,
}

/// A request's candidates in order, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// The item ids.
    pub items: Vec<u64>,
    /// The index of each item among the request's candidates.
    pub rows: Vec<usize>,
    /// The scores that the expert gave.
    pub scores: Vec<f32>,
    /// The propensities that the expert gave, if it explores.
    pub propensities: Vec<Option<f32>>,
}

impl Harness {
    /// Loads a component in the default world (see [`World::default`]).
    ///
    /// # Panics
    /// The host refuses the component. The message says why.
    #[track_caller]
    pub fn of(component: impl AsRef<Path>) -> Harness {
        World::default().component(component.as_ref()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Runs the SDK's trait in the default world, in this process and without Wasm, for use with a
    /// debugger.
    ///
    /// # Panics
    /// The network cannot be built, or the host refuses it.
    #[track_caller]
    pub fn native<E: Expert + 'static>() -> Harness {
        World::default().native::<E>().unwrap_or_else(|error| panic!("{error}"))
    }

    /// An expert with random parameters.
    pub(crate) fn new(
        world: &World,
        description: Description,
        info: HostInfo,
        graph: Arc<ExpertGraph>,
        code: Arc<dyn ExpertCode>,
    ) -> Result<Harness, Error> {
        let tae_dim = world.options.tae_dim;
        let fm_version = world.options.fm_version.as_deref().unwrap_or_default();
        let normaliser = training::normaliser(world);
        let provenance = Provenance::new(&description, &graph, fm_version, tae_dim, normaliser);
        let parameters = Parameters::init(&graph, provenance, training::SEED);
        let parameters = training::shaken(parameters, &graph);
        Ok(Harness {
            columns: ExpertColumns::new(&description, world.schema(), world.options.vectors())?,
            network: network(graph.clone(), parameters.clone(), Device::Cpu)?.into(),
            world: world.clone(),
            description,
            info,
            graph,
            parameters,
            code,
            drops: false,
        })
    }

    /// The same expert with other parameters.
    pub(crate) fn with_parameters(&self, parameters: Parameters) -> Result<Harness, Error> {
        let network = network(self.graph.clone(), parameters.clone(), Device::Cpu)?.into();
        Ok(Harness { network, parameters, ..self.clone() })
    }

    /// The expert loaded again, with the same parameters.
    pub(crate) fn reloaded(&self) -> Result<Harness, Error> {
        self.code.load(&self.world)?.with_parameters(self.parameters.clone())
    }

    /// Accepts rankings that leave candidates out, for an expert that filters on purpose.
    pub fn may_drop_candidates(self) -> Harness {
        Harness { drops: true, ..self }
    }

    /// Loads parameters from a file that `cargo hypercast train` wrote.
    ///
    /// # Errors
    /// The file cannot be read or belongs to another network.
    pub fn parameters(self, file: &Path) -> Result<Harness, Error> {
        let saved = SavedParameters::read(file)?;
        self.with_parameters(Parameters::restore(&self.graph, saved)?)
    }

    /// Sets the parameters that the expert's training begins with.
    ///
    /// # Errors
    /// The network cannot run.
    pub fn untrained(self) -> Result<Harness, Error> {
        let provenance = self.parameters.provenance.clone();
        let parameters = Parameters::init(&self.graph, provenance, training::SEED);
        self.with_parameters(parameters)
    }

    /// Trains the expert on a log with the host's own trainer and the expert's hooks.
    ///
    /// # Errors
    /// A hook faults.
    ///
    /// # Panics
    /// The expert is native. The host's trainer can only train components.
    pub fn trained(self, log: &[Case]) -> Result<Harness, Error> {
        let TrainingResult { parameters, .. } =
            self.train(log)?.expect("only components can be trained, not native experts");
        self.with_parameters(parameters)
    }

    /// The world of this test, which builds requests.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The description that the expert returned at load.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The expert's current parameters.
    pub fn parameter_values(&self) -> &Parameters {
        &self.parameters
    }

    /// The last lines that the expert wrote with `log`; none of a native expert, which prints them.
    pub fn log_lines(&self) -> Vec<LogLine> {
        let plugin = self.code.blueprint().map(|blueprint| &blueprint.plugin);
        plugin.map_or(Vec::new(), |plugin| plugin.log().lines(&self.description.name))
    }

    /// Runs the network on a request's candidates.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn predict(&self, case: &Case) -> Result<ExpertPredictions, String> {
        let provenance = &self.parameters.provenance;
        let batch = self.columns.batch(&[&case.example], case.fm(), provenance);
        let outputs = if batch.rows == 0 { Vec::new() } else { self.network.outputs(&batch) };
        Ok(ExpertPredictions::new(
            &self.graph,
            &self.description.tasks,
            &provenance.labels,
            &outputs,
        ))
    }

    /// Runs the network, then `rank`, as a daemon does.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn rank(&self, case: &Case, limit: usize) -> Result<Ranking, String> {
        self.rank_by(case, self.predict(case)?.for_rank().into_owned(), limit)
    }

    /// Runs `rank` alone, with the given predictions, to test the value model and the rules.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn rank_with(
        &self,
        case: &Case,
        predictions: &[(&str, Vec<f32>)],
        limit: usize,
    ) -> Result<Ranking, String> {
        let one = |(task, values): &(&str, Vec<f32>)| Prediction {
            task: (*task).into(),
            values: values.clone(),
        };
        self.rank_by(case, predictions.iter().map(one).collect(), limit)
    }

    /// Returns the expert's labels, one entry per task. The rows are the candidates of all
    /// requests, in order.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn labels(&self, cases: &[Case]) -> Result<Vec<TaskLabels>, String> {
        self.code.labels(&self.actions(cases))
    }

    /// Returns the expert's loss weights of each task of its description, by which those of its
    /// labels are multiplied; none for a task where all are 1.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn weights(&self, cases: &[Case]) -> Result<Vec<Vec<f32>>, String> {
        self.code.weights(&self.actions(cases))
    }

    /// Returns the probability of keeping each candidate of the requests for training.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn sample(&self, cases: &[Case]) -> Result<Vec<f32>, String> {
        self.code.sample(&self.actions(cases))
    }

    /// Returns the factor for the learning rate of a training step.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        self.code.schedule(step)
    }

    /// Returns the expert's verdict on an evaluation.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        self.code.evaluate(evaluation)
    }

    /// Returns the rows that `evaluate_rows` receives for some requests: the expert's own labels
    /// and predictions. A test may change any of them; there is no serving version.
    ///
    /// # Errors
    /// A call faults. The error is the message of the fault.
    pub fn evaluation_rows(&self, cases: &[Case]) -> Result<EvaluationRows, String> {
        let mut candidate = vec![Vec::new(); self.description.tasks.len()];
        for case in cases {
            let said = self.predict(case)?.tasks;
            candidate.iter_mut().zip(said).for_each(|(all, own)| all.extend(own.values));
        }
        let of_task = |(labels, candidate): (TaskLabels, Vec<f32>)| ScoredTask {
            task: labels.task,
            labels: labels.labels,
            mask: labels.mask,
            candidate,
            serving: Vec::new(),
        };
        let rows = (0..).zip(cases);
        Ok(EvaluationRows {
            request: rows.flat_map(|(at, own)| vec![at; own.candidates()]).collect(),
            batch: self.actions(cases),
            tasks: self.labels(cases)?.into_iter().zip(candidate).map(of_task).collect(),
        })
    }

    /// Returns the expert's verdict on an evaluation with rows, of which there is at least one.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn evaluate_rows(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Verdict, String> {
        self.code.evaluate_rows(evaluation, rows)
    }

    /// Returns the expert's score of a pass of training on rows that it did not learn from, higher
    /// is better; none if it leaves that to the host.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn validation_score(
        &self,
        evaluation: &Evaluation,
        rows: &EvaluationRows,
    ) -> Result<Option<f64>, String> {
        self.code.validation_score(evaluation, rows)
    }

    pub(crate) fn rank_by(
        &self,
        case: &Case,
        predictions: Vec<Prediction>,
        limit: usize,
    ) -> Result<Ranking, String> {
        let call = self.call(case, predictions, limit);
        Ranking::new(case, &self.code.rank(&call)?)
    }

    fn actions(&self, cases: &[Case]) -> ActionBatch {
        let requests = cases.iter();
        let requests: Vec<GuestRequest> = requests
            .map(|case| GuestRequest {
                example: &case.example,
                fm: case.fm(),
                ranked: &case.ranked,
            })
            .collect();
        self.columns.hook_batch(&requests, &self.info)
    }

    /// The arguments with which the host would call `rank`.
    pub(crate) fn call(&self, case: &Case, predictions: Vec<Prediction>, limit: usize) -> RankCall {
        let request = contract::rank_request(&case.example, &self.info, limit);
        let columns = self.columns.rank_columns(&case.example, case.fm());
        RankCall { request, predictions, columns }
    }

    /// Trains the expert. Returns `None` for a native expert, which cannot be trained.
    pub(crate) fn train(&self, log: &[Case]) -> Result<Option<TrainingResult>, Error> {
        self.code.blueprint().map(|blueprint| training::train(blueprint, log)).transpose()
    }

    /// The indices of the surfaces that the expert serves.
    pub(crate) fn surfaces(&self) -> Vec<u16> {
        let served = &self.description.surfaces;
        let all = self.info.surfaces.iter().enumerate();
        let own = all.filter(|(_, name)| served.is_empty() || served.contains(name));
        own.map(|(index, _)| index as u16).collect()
    }

    /// Requests on every surface that the expert serves, with each of the numbers of candidates and
    /// past events in `sizes`. Those of surface s have the numbers from `first + s * step` on.
    pub(crate) fn requests(&self, first: u64, step: u64, sizes: &[[usize; 2]]) -> Vec<Case> {
        let of_surface = |surface: u16| {
            let name = &self.info.surfaces[usize::from(surface)];
            let numbers = first + u64::from(surface) * step..;
            sizes.iter().zip(numbers).map(move |(&[candidates, history], number)| {
                let request = self.world.request(number).surface(name);
                request.candidates(candidates).history(history).serving().build()
            })
        };
        self.surfaces().into_iter().flat_map(of_surface).collect()
    }

    pub(crate) fn place(&self, case: &Case) -> FailureLocation {
        FailureLocation::of(&case.example, &self.info.surfaces)
    }
}

impl Ranking {
    /// Fails if an entry is not the index of a candidate.
    fn new(case: &Case, ranked: &[Ranked]) -> Result<Ranking, String> {
        let targets = &case.example.targets;
        let item = |entry: &Ranked| {
            let (index, count) = (entry.candidate, targets.len());
            targets.get(index as usize).map(|target| target.item.id).ok_or_else(|| {
                format!("candidate index {index} is out of range: there are {count} candidates")
            })
        };
        Ok(Ranking {
            items: ranked.iter().map(item).collect::<Result<_, _>>()?,
            rows: ranked.iter().map(|entry| entry.candidate as usize).collect(),
            scores: ranked.iter().map(|entry| entry.score).collect(),
            propensities: ranked.iter().map(|entry| entry.propensity).collect(),
        })
    }
}
