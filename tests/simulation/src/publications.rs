//! Weights that a trainer publishes and a daemon follows: after each publication the daemon has
//! exactly the weights that the trainer had when it made it.

use std::{sync::Arc, time::Duration};

use hypercast_stream::{
    publish::{PublicationFollower, PublicationKind},
    streams::{StreamEngine, Topic},
};

use crate::{model::WEIGHTS, trainer::VERSION, world::Simulation};

/// The stream of the weights that are published.
pub fn topic() -> Topic {
    Topic::fm(VERSION)
}

/// The weights of a trainer, with their manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedWeights {
    /// The manifest of the publication.
    pub name: String,
    /// All of them.
    pub values: Vec<f32>,
}

/// The weights that a daemon serves with.
pub struct ServedWeights {
    topic: Topic,
    follower: PublicationFollower,
    /// None before the first snapshot.
    pub weights: Option<NamedWeights>,
}

impl ServedWeights {
    /// Follows from the newest snapshot on.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub fn open(engine: Arc<dyn StreamEngine>, topic: Topic) -> Result<ServedWeights, String> {
        let follower = PublicationFollower::open(engine, topic.clone());
        let follower = follower.map_err(|error| error.to_string())?;
        Ok(ServedWeights { topic, follower, weights: None })
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
            let is_known = world.ledger.borrow().has_weights(&self.topic, &weights);
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
    let is_served = |weights: &NamedWeights| served == Some(weights);
    let served = ledger.published.iter().rposition(is_served);
    let last = ledger.last_published;
    drop(ledger);
    drop(life);
    // A publication whose answer was lost may be there, too.
    if served < last {
        let what = format!("the daemon has number {served:?}, but {last:?} was published");
        world.violate("publications", what);
    }
}
