//! Weights that a trainer publishes and a daemon follows: after each publication the daemon has
//! exactly the weights that the trainer had when it made it.

use std::{path::Path, sync::Arc, time::Duration};

use hypercast_config::PublishSettings;
use hypercast_core::entropy;
use hypercast_store::Store;
use hypercast_stream::{
    publish::{
        DenseTensor, PublicationFollower, PublicationKind, Publisher, TrainingPosition,
        WeightSource,
    },
    streams::{StreamEngine, Topic},
};

use crate::world::Simulation;

/// The number of weights: several blocks of a delta.
const WEIGHTS: usize = 2000;

/// One step in so many publishes something.
const PUBLISHES: u64 = 20;

/// A delta has all that moved, so that a follower has the trainer's weights exactly.
const SETTINGS: PublishSettings =
    PublishSettings { share: 1.0, starve_after: 1, every_s: 1, snapshot_every: 4, zstd_level: 1 };

/// The stream of the weights that are published.
pub fn topic() -> Topic {
    Topic::fm("0.1.0")
}

/// The weights of a trainer, with a name for what they are now.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedWeights {
    /// In the manifest of the publication.
    pub name: String,
    /// All of them.
    pub values: Vec<f32>,
}

impl WeightSource for NamedWeights {
    fn manifest(&self) -> String {
        self.name.clone()
    }

    fn dense(&self) -> Vec<DenseTensor<'_>> {
        vec![DenseTensor { name: "weights", shape: &[WEIGHTS], values: &self.values }]
    }

    fn rows(&self) -> Option<&Store> {
        None
    }
}

/// Moves weights and publishes them.
pub struct PublishingTrainer {
    publisher: Publisher,
    weights: NamedWeights,
}

impl PublishingTrainer {
    /// A trainer with new weights.
    ///
    /// # Errors
    /// Another process publishes, or the engine cannot be reached.
    pub fn open(engine: Arc<dyn StreamEngine>) -> Result<PublishingTrainer, String> {
        let publisher = Publisher::open(engine, topic(), SETTINGS, Path::new("/work/publish"));
        let weights = NamedWeights { name: String::new(), values: vec![0.0; WEIGHTS] };
        Ok(PublishingTrainer { publisher: publisher.map_err(|error| error.to_string())?, weights })
    }

    /// Perhaps moves some weights and publishes them. A failure is tried again with a later step.
    pub fn step(&mut self) {
        let world = Simulation::current();
        if world.healed.get() || !entropy::number().is_multiple_of(PUBLISHES) {
            return;
        }
        let name = entropy::number();
        for _ in 0..name % 5 + 1 {
            let choice = entropy::number();
            self.weights.values[choice as usize % WEIGHTS] = (choice >> 40) as f32;
        }
        self.weights.name = format!("{name:016x}");
        // Whoever follows may see it before this process knows that it is stored.
        world.ledger.borrow_mut().published.push(self.weights.clone());
        let training =
            TrainingPosition { trained_position: 0, trained_until_ms: 0, ingested_ms: 0 };
        match self.publisher.publish(&self.weights, training) {
            Ok(_) => world.ledger.borrow_mut().last_published = Some(self.weights.name.clone()),
            Err(error) => tracing::warn!(%error, "weights are not published"),
        }
    }
}

/// The weights that a daemon serves with.
pub struct ServedWeights {
    follower: PublicationFollower,
    /// None before the first snapshot.
    pub weights: Option<NamedWeights>,
}

impl ServedWeights {
    /// Follows from the newest snapshot on.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(engine: Arc<dyn StreamEngine>) -> Result<ServedWeights, String> {
        let follower = PublicationFollower::open(engine, topic());
        Ok(ServedWeights { follower: follower.map_err(|error| error.to_string())?, weights: None })
    }

    /// Takes the publications that have come. What fails is tried again with the next step.
    pub fn step(&mut self) {
        loop {
            let publication = match self.follower.next(Duration::ZERO) {
                Ok(Some(publication)) => publication,
                Ok(None) => return,
                Err(error) => return tracing::warn!(%error, "weights cannot be followed"),
            };
            let is_snapshot = publication.header.kind == PublicationKind::Snapshot;
            let name = publication.header.manifest;
            let values = match self.weights.take() {
                _ if is_snapshot => vec![f32::NAN; WEIGHTS],
                Some(weights) => weights.values,
                None => {
                    Simulation::current()
                        .violate("publications", format!("{name} continues nothing"));
                    return;
                }
            };
            let mut weights = NamedWeights { name, values };
            for block in publication.blocks {
                let end = block.start + block.values.len();
                weights.values[block.start..end].copy_from_slice(&block.values);
            }
            let world = Simulation::current();
            let is_known = world.ledger.borrow().published.contains(&weights);
            if !is_known {
                let name = &weights.name;
                world.violate("publications", format!("no trainer had the weights of {name}"));
            }
            self.weights = Some(weights);
        }
    }
}

/// At rest the daemon serves with what was published last, unless publications were lost: then it
/// waits for the next snapshot.
pub fn check(world: &Simulation) {
    if !world.ledger.borrow().lost(&topic()).is_empty() {
        return;
    }
    let life = world.processes[0].life.borrow();
    let served = life.as_ref().and_then(|life| life.served.as_ref()?.weights.as_ref());
    let ledger = world.ledger.borrow();
    let (published, last) = (&ledger.published, &ledger.last_published);
    let place = |name: &String| published.iter().position(|of| of.name == *name);
    let (served, last) = (served.and_then(|of| place(&of.name)), last.as_ref().and_then(place));
    drop((life, ledger));
    // A publication whose answer was lost may be there, too.
    if served < last {
        let what = format!("the daemon has number {served:?}, but {last:?} was published");
        world.violate("publications", what);
    }
}
