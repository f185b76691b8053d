//! A trainer's complete state, to stop a trainer and continue later. The caller decides where it is
//! saved, and with which position of a stream.

use std::sync::Arc;

use hypercast_fm::label_scale::LabelScales;
use serde::{Deserialize, Serialize};

use super::{ExpertOptimizer, ExpertTrainer, TrainerConfig};
use crate::params::{Parameters, Provenance, hash_text};
use crate::{Blueprint, Device, Error};

/// The state from which [`ExpertTrainer::resume`] continues.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedTrainer {
    /// The parameters without averaging, in the graph's order.
    values: Vec<Vec<f32>>,
    /// The plugin, network and FM that they belong to.
    provenance: Provenance,
    /// The averaged parameters, and the number of steps averaged.
    average: Option<(Vec<Vec<f32>>, u64)>,
    optimizer: ExpertOptimizer,
    /// The number of chunks learned from.
    chunks: u64,
}

impl SavedTrainer {
    /// The plugin, network and FM that the parameters belong to.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Sets the scales of tasks, which a binary form of this state does not have.
    pub fn set_scales(&mut self, labels: LabelScales) {
        self.provenance.labels = labels;
    }

    /// Whether parameters, average and optimiser equal those of `other`. The random state may
    /// differ.
    pub fn learned_like(&self, other: &SavedTrainer) -> bool {
        *self == SavedTrainer { chunks: self.chunks, ..other.clone() }
    }

    /// The parameters for predictions: the averaged ones, if there are any.
    ///
    /// # Errors
    /// They do not fit the expert; the error says what they are of instead.
    pub fn predicting(&self, blueprint: &Blueprint) -> Result<Parameters, &'static str> {
        let values = self.average.as_ref().map_or(&self.values, |(values, _)| values);
        self.parameters(blueprint, values)
    }

    /// Parameters whose columns are standardised as they were, wherever they stand in the schema
    /// now.
    fn parameters(
        &self,
        blueprint: &Blueprint,
        values: &[Vec<f32>],
    ) -> Result<Parameters, &'static str> {
        let graph = &blueprint.graph;
        if self.provenance.graph != hash_text(graph) {
            return Err("another network");
        }
        let normaliser = self.provenance.normaliser.grown(blueprint.columns.feature_names());
        let normaliser = normaliser.ok_or("numeric features that the schema lacks")?;
        let provenance = Provenance { normaliser, ..self.provenance.clone() };
        Parameters::with_values(graph, values.to_vec(), provenance)
            .filter(|_| self.optimizer.fits(graph))
            .ok_or("parameters of other shapes or optimisers")
    }
}

impl ExpertTrainer {
    /// The state from which [`ExpertTrainer::resume`] continues.
    pub fn saved(&self) -> SavedTrainer {
        let average = self.average.as_ref();
        SavedTrainer {
            values: self.parameters.to_values(),
            provenance: self.parameters.provenance.clone(),
            average: average.map(|average| (average.parameters.to_values(), average.steps)),
            optimizer: self.optimizer.clone(),
            chunks: self.chunks,
        }
    }

    /// Continues from a saved trainer. With the same configuration and chunks it computes what the
    /// saved trainer would have.
    ///
    /// # Errors
    /// The state is of another network or plugin, or only one of state and `config` averages.
    pub fn resume(
        blueprint: Arc<Blueprint>,
        saved: SavedTrainer,
        config: TrainerConfig,
        device: Device,
    ) -> Result<ExpertTrainer, Error> {
        let parameters = saved.parameters(&blueprint, &saved.values).map_err(misfit(&blueprint))?;
        if saved.average.is_some() != (config.average_decay > 0.0) {
            let other = "a configuration with or without averaging (expert_training.average_decay)";
            return Err(misfit(&blueprint)(other));
        }
        let mut trainer = ExpertTrainer::new(blueprint, parameters, config, device)?;
        trainer.chunks = saved.chunks;
        trainer.go_back(&saved)?;
        Ok(trainer)
    }

    /// Sets parameters, average and optimiser back to a saved state. The random state is not set
    /// back, so that later sampling and shuffling do not repeat.
    ///
    /// # Errors
    /// The state is of another network.
    pub fn go_back(&mut self, saved: &SavedTrainer) -> Result<(), Error> {
        let (blueprint, misfit) = (&self.blueprint, misfit(&self.blueprint));
        let parameters = saved.parameters(blueprint, &saved.values).map_err(&misfit)?;
        let predicting = saved.predicting(blueprint).map_err(&misfit)?;
        self.parameters = parameters;
        self.optimizer = saved.optimizer.clone();
        let average = self.average.take().zip(saved.average.as_ref());
        self.average = average.map(|(mut own, (_, steps))| {
            (own.parameters, own.steps) = (predicting, *steps);
            own
        });
        Ok(())
    }
}

fn misfit(blueprint: &Blueprint) -> impl Fn(&'static str) -> Error + use<'_> {
    |other| {
        let why = format!("the saved trainer is of {other}; train the expert anew");
        Error::misfit(&blueprint.description.name, why)
    }
}
