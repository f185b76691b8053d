//! An expert in a world, with the calls that a test can make.

use std::any::Any;
use std::path::Path;

use hypercast_expert::{ExpertPredictions, Parameters, SavedParameters};
use hypercast_sdk::Expert;

use crate::cases::Case;
use crate::component::ComponentRuntime;
use crate::contract::{
    Description, Evaluation, Prediction, RankRequest, Ranked, TaskLabels, TrainingStep, Verdict,
};
use crate::error::{Error, FailureLocation};
use crate::runtime::{RankCall, Runtime, action_batch};
use crate::training::{self, TrainingResult};
use crate::world::World;

/// An expert under test. Its parameters are random, unless set by [`Harness::trained`] or
/// [`Harness::parameters`].
pub struct Harness {
    pub(crate) world: World,
    pub(crate) runtime: Box<dyn Runtime>,
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

    pub(crate) fn new(world: World, runtime: Box<dyn Runtime>) -> Harness {
        Harness { world, runtime, drops: false }
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
        let parameters = Parameters::restore(self.runtime.graph(), saved)?;
        Ok(Harness { runtime: self.runtime.with_parameters(parameters)?, ..self })
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
        Ok(Harness { runtime: self.runtime.with_parameters(parameters)?, ..self })
    }

    /// The world of this test, which builds requests.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// The description that the expert returned at load.
    pub fn description(&self) -> &Description {
        self.runtime.description()
    }

    /// The expert's current parameters.
    pub fn parameter_values(&self) -> &Parameters {
        self.runtime.parameters()
    }

    /// Runs the network on a request's candidates.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn predict(&self, case: &Case) -> Result<ExpertPredictions, String> {
        self.runtime.predict(case)
    }

    /// Runs the network, then `rank`, as a daemon does.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn rank(&self, case: &Case, limit: usize) -> Result<Ranking, String> {
        let predictions = self.predict(case)?.tasks;
        self.rank_by(case, predictions, limit)
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
        self.runtime.labels(&action_batch(cases, self.runtime.info()))
    }

    /// Returns the probability of keeping each candidate of the requests for training.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn sample(&self, cases: &[Case]) -> Result<Vec<f32>, String> {
        self.runtime.sample(&action_batch(cases, self.runtime.info()))
    }

    /// Returns the factor for the learning rate of a training step.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        self.runtime.schedule(step)
    }

    /// Returns the expert's verdict on an evaluation.
    ///
    /// # Errors
    /// The call faults. The error is the message of the fault.
    pub fn evaluate(&self, evaluation: &Evaluation) -> Result<Verdict, String> {
        self.runtime.evaluate(evaluation)
    }

    fn rank_by(
        &self,
        case: &Case,
        predictions: Vec<Prediction>,
        limit: usize,
    ) -> Result<Ranking, String> {
        let call = self.call(case, predictions, limit);
        let ranked = self.runtime.rank(&call)?;
        Ranking::new(case, &ranked)
    }

    /// The arguments with which the host would call `rank`.
    pub(crate) fn call(&self, case: &Case, predictions: Vec<Prediction>, limit: usize) -> RankCall {
        let example = &case.example;
        let surfaces = &self.runtime.info().surfaces;
        let request = RankRequest {
            surface: surfaces[usize::from(example.surface)].clone(),
            user: example.user.id,
            time_ms: example.time_ms,
            candidates: example.targets.iter().map(|target| target.item.id).collect(),
            limit: limit.min(case.candidates()) as u32,
        };
        RankCall { request, predictions, columns: self.runtime.rank_columns(case) }
    }

    /// Trains the expert. Returns `None` for a native expert, which cannot be trained.
    pub(crate) fn train(&self, log: &[Case]) -> Result<Option<TrainingResult>, Error> {
        let runtime: &dyn Any = &*self.runtime;
        let component = runtime.downcast_ref::<ComponentRuntime>();
        component.map(|component| training::train(component.blueprint(), log)).transpose()
    }

    /// The indices of the surfaces that the expert serves.
    pub(crate) fn surfaces(&self) -> Vec<u16> {
        let served = &self.description().surfaces;
        let all = self.runtime.info().surfaces.iter().enumerate();
        let own = all.filter(|(_, name)| served.is_empty() || served.contains(name));
        own.map(|(index, _)| index as u16).collect()
    }

    pub(crate) fn place(&self, case: &Case) -> FailureLocation {
        FailureLocation::of(&case.example, &self.runtime.info().surfaces)
    }
}

impl Ranking {
    /// Fails if an entry is not the index of a candidate.
    fn new(case: &Case, ranked: &[Ranked]) -> Result<Ranking, String> {
        let targets = &case.example.targets;
        let item = |entry: &Ranked| {
            let target = targets.get(entry.candidate as usize);
            target.map(|target| target.item.id).ok_or_else(|| {
                format!(
                    "candidate index {} is out of range: the request has {} candidates",
                    entry.candidate,
                    targets.len()
                )
            })
        };
        Ok(Ranking {
            items: ranked.iter().map(item).collect::<Result<_, _>>()?,
            rows: ranked.iter().map(|entry| entry.candidate as usize).collect(),
            scores: ranked.iter().map(|entry| entry.score).collect(),
        })
    }
}
