//! Decisions about versions that several processes make on one stream, and what must hold of them:
//! each was made on the state before it, and is there once if its process was told so.

use std::{sync::Arc, time::Duration};

use hypercast_core::{clock, entropy};
use hypercast_data::versioned;
use hypercast_stream::{
    Error,
    registry::{
        Change, Decision, FmVersion, Registry, RegistryFollower, VersionState, WeightsLocation,
    },
    streams::{Record, StreamEngine, StreamRecord, Topic},
};

use crate::{
    rollout_oracles::{self, follows_rules, wrong_shares},
    world::Simulation,
};

/// One step in so many decides something.
const DECIDES: u64 = 50;

/// Follows the registry, and now and then decides something.
pub struct Decider {
    process: usize,
    /// When its life began, since the beginning.
    opened: Duration,
    engine: Arc<dyn StreamEngine>,
    /// The registry as this process knows it.
    pub versions: RegistryFollower,
}

/// A registration that a process was told to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegisteredVersion {
    /// The version.
    pub version: String,
    /// When the process began to decide, in a count of beginnings and ends of all processes.
    pub begun: u64,
    /// When it was told.
    pub ended: u64,
}

impl Decider {
    /// A follower of the registry from its first decision on.
    ///
    /// # Errors
    /// The engine cannot be read.
    pub fn open(process: usize, engine: Arc<dyn StreamEngine>) -> Result<Decider, String> {
        let opened = Simulation::current().timeline.now.get();
        let versions = RegistryFollower::new(&*engine).map_err(|error| error.to_string())?;
        Ok(Decider { process, opened, engine, versions })
    }

    /// Reads what others decided, and perhaps decides something. What fails is tried again, as the
    /// daemon and trainers do it.
    pub fn step(&mut self) {
        let read = self.versions.poll(&*self.engine, Duration::ZERO);
        let world = Simulation::current();
        if let Err(error) = &read {
            tracing::warn!(%error, "decisions cannot be followed");
        }
        if read.is_ok() {
            world.check_told(self.process, self.opened, &self.versions);
        }
        if read.is_err() || world.healed.get() || !entropy::number().is_multiple_of(DECIDES) {
            return;
        }
        let choice = entropy::number();
        let count = || world.ledger.borrow_mut().moment();
        let begun = count();
        let version = drawn(choice);
        let misses_before = self.versions.registry().unapplied().is_some();
        let decided = self.versions.decide::<Error>(&*self.engine, |registry| {
            let known = registry.fms();
            match known.get(choice as usize % (known.len() + 2)) {
                Some(fm) if choice.is_multiple_of(3) => registry.shadow_fm(&fm.version),
                Some(fm) if choice.is_multiple_of(5) => registry.retire_fm(&fm.version),
                Some(fm) => registry.promote_fm(&fm.version),
                None => registry.register_fm(&simulated_fm(version.clone())),
            }
        });
        if let Err(error) = &decided {
            tracing::warn!(%error, "nothing can be decided");
        }
        if misses_before && matches!(decided, Ok(true)) {
            world.violate("decisions", "one was made on a registry that misses others".into());
        }
        let is_registered = self.versions.registry().fm(&version).is_some();
        if decided.is_ok_and(|decided| decided) && is_registered {
            let ended = count();
            let registered = RegisteredVersion { version, begun, ended };
            world.ledger.borrow_mut().registered.push(registered);
        }
    }
}

/// The version of a choice.
pub(crate) fn drawn(choice: u64) -> String {
    format!("0.{}.{}", choice >> 40, choice & 0xffff)
}

/// An FM version of a simulation.
pub fn simulated_fm(version: String) -> FmVersion {
    FmVersion {
        version,
        state: VersionState::Training,
        parent: None,
        from_checkpoint: None,
        schema: "simulated".into(),
        earlier_schemas: Vec::new(),
        columns: Vec::new(),
        tae_dim: 4,
        one_stage_flops: None,
        created_ms: clock::now_ms(),
        trained_ms: 0,
        weights: WeightsLocation::Published,
    }
}

/// Appends a decision that only a later version of the host knows.
///
/// # Errors
/// The engine cannot be reached.
pub fn decide_as_later_version(engine: &dyn StreamEngine) -> Result<(), String> {
    let payload = br#"{"format":2,"made_by":"9.0.0"}"#.to_vec();
    let told = |error: Error| error.to_string();
    loop {
        let end = engine.span(&Topic::versions()).map_err(told)?.end;
        let record = Record { id: 0, payload: payload.clone() };
        if engine.append_at(&Topic::versions(), end, &[record]).map_err(told)?.is_some() {
            return Ok(());
        }
    }
}

/// Holds the stream of decisions against what processes were told, and their registries against
/// the stream.
pub fn check(world: &Simulation, stored: &[StreamRecord]) {
    let mut registry = Registry::default();
    let mut is_left_out = false;
    let mut order: Vec<String> = Vec::new();
    for record in stored {
        let Some(decision) = versioned::from_json::<Decision>(&record.payload, 1).ok() else {
            is_left_out = true;
            continue;
        };
        let position = record.position;
        if is_left_out {
            world.violate("decisions", format!("{position} was made on an unknown state"));
        }
        if allowed(&registry, &decision.changes) != Some(true) {
            world.violate("decisions", format!("{position} was not made on the state before it"));
        }
        if let Err(error) = registry.apply(&decision) {
            world.violate("decisions", format!("{position}: {error}"));
        }
        if let Some(wrong) = wrong_shares(&registry) {
            world.violate("decisions", format!("{position}: {wrong}"));
        }
        order.extend(decision.changes.iter().filter_map(|change| match change {
            Change::FmRegistered { fm } => Some(fm.version.clone()),
            _ => None,
        }));
    }
    let registered = world.ledger.borrow().registered.clone();
    let place = |of: &RegisteredVersion| order.iter().position(|version| *version == of.version);
    for of in &registered {
        if order.iter().filter(|version| **version == of.version).count() != 1 {
            world.violate("decisions", format!("{} is not stored once", of.version));
        }
        let is_late =
            |later: &&RegisteredVersion| of.ended < later.begun && place(of) > place(later);
        if let Some(later) = registered.iter().find(is_late) {
            let (first, second) = (&of.version, &later.version);
            world.violate("decisions", format!("{first} was made before {second}, but is behind"));
        }
    }
    for process in &world.processes {
        let life = process.life.borrow();
        let Some(decider) = life.as_ref().map(|life| &life.decider) else { continue };
        let known = decider.versions.registry();
        let is_told = known.unapplied().is_some();
        let is_equal = known.fms() == registry.fms() && known.experts().eq(registry.experts());
        if !is_equal || is_told != is_left_out {
            world.violate("decisions", format!("{:?} has another registry", process.role));
        }
    }
    // What rollouts had decided may be gone.
    if !world.ledger.borrow().decisions_undone {
        rollout_oracles::check(world, &registry, is_left_out);
    }
}

/// Whether the rules make these changes of a state; none where there are no changes.
fn allowed(registry: &Registry, changes: &[Change]) -> Option<bool> {
    let made = match changes.first()? {
        Change::FmRegistered { fm } => registry.register_fm(fm),
        Change::FmState { version, state: VersionState::Active } => registry.promote_fm(version),
        Change::FmState { version, state: VersionState::Shadow } => registry.shadow_fm(version),
        Change::FmState { version, state: VersionState::Retired } => registry.retire_fm(version),
        _ => return Some(follows_rules(registry, changes)),
    };
    Some(made.is_ok_and(|made| made == changes))
}
