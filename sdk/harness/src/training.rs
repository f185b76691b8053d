//! Parameters for tests: random ones, or ones that the host's own trainer learned from a small log.

use std::sync::Arc;

use hypercast_expert::graph::ExpertGraph;
use hypercast_expert::train::OptimizerConfig;
use hypercast_expert::{
    Blueprint, Chunk, Device, ExpertTrainer, FeatureStatistics, Normaliser, Parameters,
    TrainerConfig,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::cases::Case;
use crate::error::Error;
use crate::world::World;

/// The seed of all initial values.
pub(crate) const SEED: u64 = 1;

/// The largest amount that is added to, or subtracted from, an initial value.
const SHAKE: f32 = 0.1;

/// The number of passes over a log. With a small log, output layers need about this many to learn
/// the rates of their tasks.
const PASSES: usize = 6;

/// The normaliser of numeric features that a log of this world gives.
pub(crate) fn normaliser(world: &World) -> Normaliser {
    let surfaces: Vec<u16> = (0..world.schema().surfaces.len() as u16).collect();
    normaliser_of(&world.schema().feature_columns(), &world.log(50, &surfaces))
}

fn normaliser_of(columns: &[String], log: &[Case]) -> Normaliser {
    let mut statistics = FeatureStatistics::new(columns);
    log.iter().for_each(|case| statistics.observe(&case.example));
    statistics.finish()
}

/// Adds random amounts to all values. Initial values are often zero, which would hide mistakes in
/// the network.
pub(crate) fn shaken(mut parameters: Parameters, graph: &ExpertGraph) -> Parameters {
    let mut random = SmallRng::seed_from_u64(SEED);
    for index in 0..graph.parameters.len() {
        let values = parameters.values_mut(index).iter_mut();
        values.for_each(|value| *value += random.random_range(-SHAKE..SHAKE));
    }
    parameters
}

/// The result of a training.
pub(crate) struct TrainingResult {
    pub(crate) parameters: Parameters,
    /// The index of the first step whose gradient was not finite.
    pub(crate) lost_step: Option<usize>,
}

/// Trains fresh parameters on a log.
///
/// # Errors
/// A training hook that faults.
pub(crate) fn train(blueprint: &Arc<Blueprint>, log: &[Case]) -> Result<TrainingResult, Error> {
    let normaliser = normaliser_of(blueprint.columns.feature_names(), log);
    let parameters = blueprint.init_parameters(normaliser, SEED);
    // The log has few rows, so use small batches and a high learning rate.
    let optimizer =
        OptimizerConfig { learning_rate: 5e-3, warmup_steps: 10, ..OptimizerConfig::default() };
    let config = TrainerConfig { optimizer, batch_rows: 128, ..TrainerConfig::default() };
    let mut trainer = ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu)?;
    let examples: Vec<_> = log.iter().map(|case| case.example.clone()).collect();
    let tae: Vec<f32> = log.iter().flat_map(|case| &case.tae).copied().collect();
    let predictions: Vec<f32> = log.iter().flat_map(|case| &case.predictions).copied().collect();
    let places = |case: &Case| {
        let mut places = case.ranked.clone();
        places.resize(case.candidates(), None);
        places
    };
    let ranked: Vec<_> = log.iter().flat_map(places).collect();
    let (mut steps, mut lost_step) = (0, None);
    for pass in 0..PASSES {
        trainer.set_repeats(pass > 0);
        let chunk =
            Chunk { examples: &examples, tae: &tae, predictions: &predictions, ranked: &ranked };
        trainer.train(chunk, |report| {
            // If sampling keeps no row, no step is made and the losses are 0.
            if !report.stepped && report.losses.iter().any(|loss| *loss != 0.0) {
                lost_step.get_or_insert(steps);
            }
            steps += 1;
        })?;
    }
    Ok(TrainingResult { parameters: trainer.into_parameters(), lost_step })
}
