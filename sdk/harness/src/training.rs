//! Parameters for tests: made up, so that every one of them matters, or trained
//! on a small log by the host's own trainer.

use std::sync::Arc;

use hypercast_expert::graph::Graph;
use hypercast_expert::train::OptimizerConfig;
use hypercast_expert::{
    Blueprint, Chunk, Device, ExpertTrainer, FeatureStatistics, Normaliser, Parameters,
    TrainerConfig,
};
use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::cases::Case;
use crate::error::Error;
use crate::world::World;

/// Of all initial values.
pub(crate) const SEED: u64 = 1;

/// How far made-up values lie from initial ones.
const SHAKE: f32 = 0.1;

/// Passes over a log: enough for the output layers of a small one to find the rates of their tasks.
const PASSES: usize = 6;

/// The standardisation that a log of this world has.
pub(crate) fn normaliser(world: &World) -> Normaliser {
    let mut statistics = FeatureStatistics::new(&world.schema().feature_columns());
    let surfaces: Vec<u16> = (0..world.schema().surfaces.len() as u16).collect();
    world.log(50, &surfaces).iter().for_each(|case| statistics.observe(&case.example));
    statistics.finish()
}

/// Initial values are often zeros, which hide what is wired wrongly. These are not.
pub(crate) fn shaken(mut parameters: Parameters, graph: &Graph) -> Parameters {
    let mut random = SmallRng::seed_from_u64(SEED);
    for index in 0..graph.parameters.len() {
        let values = parameters.values_mut(index).iter_mut();
        values.for_each(|value| *value += random.random_range(-SHAKE..SHAKE));
    }
    parameters
}

/// What training came to.
pub(crate) struct Trained {
    pub(crate) parameters: Parameters,
    /// The first step whose gradient was not finite.
    pub(crate) lost_step: Option<usize>,
}

/// Trains fresh parameters on a log.
///
/// # Errors
/// A training hook that faults.
pub(crate) fn train(blueprint: &Arc<Blueprint>, log: &[Case]) -> Result<Trained, Error> {
    let mut statistics = FeatureStatistics::new(blueprint.columns.feature_names());
    log.iter().for_each(|case| statistics.observe(&case.example));
    let parameters = blueprint.init_parameters(statistics.finish(), SEED);
    // Few rows: small batches and a high rate.
    let optimizer =
        OptimizerConfig { learning_rate: 5e-3, warmup_steps: 10, ..OptimizerConfig::default() };
    let config = TrainerConfig { optimizer, batch_rows: 128, ..TrainerConfig::default() };
    let mut trainer = ExpertTrainer::new(blueprint.clone(), parameters, config, Device::Cpu)?;
    let examples: Vec<_> = log.iter().map(|case| case.example.clone()).collect();
    let tae: Vec<f32> = log.iter().flat_map(|case| &case.tae).copied().collect();
    let (mut steps, mut lost_step) = (0, None);
    for _ in 0..PASSES {
        trainer.train(Chunk { examples: &examples, tae: &tae }, |report| {
            // A step of which sampling keeps no row is none; its losses are 0.
            if !report.stepped && report.losses.iter().any(|loss| *loss != 0.0) {
                lost_step.get_or_insert(steps);
            }
            steps += 1;
        })?;
    }
    Ok(Trained { parameters: trainer.into_parameters(), lost_step })
}
