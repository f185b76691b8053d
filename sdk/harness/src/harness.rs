//! An expert in a world: what a test asks of it.

use std::any::Any;
use std::path::Path;

use hypercast_expert::{Parameters, Predictions, SavedParameters};
use hypercast_sdk::Expert;

use crate::cases::Case;
use crate::component::Component;
use crate::contract::{
    Description, Evaluation, Prediction, RankRequest, Ranked, TaskLabels, TrainingStep, Verdict,
};
use crate::error::{Error, Place};
use crate::runtime::{RankCall, Runtime, action_batch};
use crate::training::{self, Trained};
use crate::world::World;

/// An expert under test. Its parameters are made up unless [`Harness::trained`] or [`Harness::parameters`] gave it others.
pub struct Harness {
    pub(crate) world: World,
    pub(crate) runtime: Box<dyn Runtime>,
    pub(crate) drops: bool,
}

/// A request's candidates in order, best first.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// Item ids.
    pub items: Vec<u64>,
    /// Each one's place among the request's candidates.
    pub rows: Vec<usize>,
    /// The expert's scores.
    pub scores: Vec<f32>,
}

impl Harness {
    /// A component in the default world (see [`World::default`]).
    ///
    /// # Panics
    /// If the host refuses it; the message says why.
    #[track_caller]
    pub fn of(component: impl AsRef<Path>) -> Harness {
        World::default().component(component.as_ref()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// The SDK's trait in the default world, in this process and without Wasm: for a debugger.
    ///
    /// # Panics
    /// If its network cannot be built, or the host refuses it.
    #[track_caller]
    pub fn native<E: Expert + 'static>() -> Harness {
        World::default().native::<E>().unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn new(world: World, runtime: Box<dyn Runtime>) -> Result<Harness, Error> {
        Ok(Harness { world, runtime, drops: false })
    }

    /// The expert leaves candidates out on purpose (a filter): a ranking need not hold all of them.
    pub fn may_drop_candidates(self) -> Harness {
        Harness { drops: true, ..self }
    }

    /// With the parameters of a file, as `cargo hypercast train` writes it.
    ///
    /// # Errors
    /// A file that is none, or of another network.
    pub fn parameters(self, file: &Path) -> Result<Harness, Error> {
        let saved = SavedParameters::read(file)?;
        let parameters = Parameters::restore(self.runtime.graph(), saved)?;
        Ok(Harness { runtime: self.runtime.with_parameters(parameters)?, ..self })
    }

    /// Trained on a log by the host's own trainer, hooks and all. It wants a component.
    ///
    /// # Errors
    /// A hook that faults.
    ///
    /// # Panics
    /// If the expert is native: the host's trainer calls components.
    pub fn trained(self, log: &[Case]) -> Result<Harness, Error> {
        let Trained { parameters, .. } =
            self.train(log)?.expect("a component: the host's trainer calls no native expert");
        Ok(Harness { runtime: self.runtime.with_parameters(parameters)?, ..self })
    }

    /// The world it is in, for requests.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// What the expert says of itself.
    pub fn description(&self) -> &Description {
        self.runtime.description()
    }

    /// The parameters that it has.
    pub fn parameter_values(&self) -> &Parameters {
        self.runtime.parameters()
    }

    /// Predictions for a request's candidates.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn predict(&self, case: &Case) -> Result<Predictions, String> {
        self.runtime.predict(case)
    }

    /// The network, then `rank`: what a daemon would answer with.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn rank(&self, case: &Case, limit: usize) -> Result<Ranking, String> {
        let predictions = self.predict(case)?.tasks;
        self.rank_by(case, predictions, limit)
    }

    /// `rank` alone, on predictions of the test's choice: the value model and the rules, without the network.
    ///
    /// # Errors
    /// The fault, in words.
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

    /// The expert's labels for some requests' candidates, a task each; rows are candidates in order.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn labels(&self, cases: &[Case]) -> Result<Vec<TaskLabels>, String> {
        self.runtime.labels(&action_batch(cases, self.runtime.info()))
    }

    /// The probability with which each of some requests' candidates is kept for training.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn sample(&self, cases: &[Case]) -> Result<Vec<f32>, String> {
        self.runtime.sample(&action_batch(cases, self.runtime.info()))
    }

    /// The factor of a training step's learning rate.
    ///
    /// # Errors
    /// The fault, in words.
    pub fn schedule(&self, step: TrainingStep) -> Result<f32, String> {
        self.runtime.schedule(step)
    }

    /// Whether the expert lets what was measured so serve.
    ///
    /// # Errors
    /// The fault, in words.
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

    /// A `rank` call as the host makes it.
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

    /// None for a native expert.
    pub(crate) fn train(&self, log: &[Case]) -> Result<Option<Trained>, Error> {
        let runtime: &dyn Any = &*self.runtime;
        let component = runtime.downcast_ref::<Component>();
        component.map(|component| training::train(component.blueprint(), log)).transpose()
    }

    /// The surfaces that the expert serves, by index.
    pub(crate) fn surfaces(&self) -> Vec<u16> {
        let served = &self.description().surfaces;
        let all = self.runtime.info().surfaces.iter().enumerate();
        let own = all.filter(|(_, name)| served.is_empty() || served.contains(name));
        own.map(|(index, _)| index as u16).collect()
    }

    pub(crate) fn place(&self, case: &Case) -> Place {
        Place::of(&case.example, &self.runtime.info().surfaces)
    }
}

impl Ranking {
    /// Fails where an entry names no candidate.
    fn new(case: &Case, ranked: &[Ranked]) -> Result<Ranking, String> {
        let targets = &case.example.targets;
        let item = |entry: &Ranked| {
            let target = targets.get(entry.candidate as usize);
            target.map(|target| target.item.id).ok_or_else(|| {
                format!("candidate index {} of {} candidates", entry.candidate, targets.len())
            })
        };
        Ok(Ranking {
            items: ranked.iter().map(item).collect::<Result<_, _>>()?,
            rows: ranked.iter().map(|entry| entry.candidate as usize).collect(),
            scores: ranked.iter().map(|entry| entry.score).collect(),
        })
    }
}
