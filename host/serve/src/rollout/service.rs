//! The entry to rollouts: accepts pushes, reports their state, and gives commands to the
//! controller, which a thread steps.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use hypercast_config::Config;
use hypercast_core::clock;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{
        Rollout,
        accept::{Acceptor, files},
        controller::RolloutController,
        replay::ReplayFn,
        serving::VersionLookup,
        state::{RolloutFiles, RolloutMap},
    },
    threads::{ThreadGroup, lock},
};

/// The rollouts of a daemon.
pub struct RolloutService {
    all: Arc<Mutex<RolloutMap>>,
    pub(super) acceptor: Arc<Acceptor>,
    /// Held for one step or one command.
    controller: Arc<Mutex<RolloutController>>,
    threads: ThreadGroup,
}

/// What the controller works with.
pub struct RolloutContext {
    /// Accepts pushes, and loads versions after a restart. It has the schema, and the streams that
    /// hold the registry.
    pub acceptor: Arc<Acceptor>,
    /// The versions that serve.
    pub serving: Arc<dyn VersionLookup>,
    /// Runs the replay of a rollout.
    pub replay: ReplayFn,
}

impl RolloutService {
    /// Opens the rollouts in the state folder; [`RolloutService::step`] continues them.
    ///
    /// # Errors
    /// Files or streams cannot be read.
    pub fn open(config: &Config, context: RolloutContext) -> Result<Self> {
        let files = RolloutFiles::open(&config.paths.state.join("rollouts"))?;
        let all = Arc::new(Mutex::new(files.read()?));
        let (threads, acceptor) = (ThreadGroup::default(), context.acceptor.clone());
        let controller =
            RolloutController::new(config, context, files, all.clone(), threads.stop.clone())?;
        Ok(Self { all, acceptor, controller: Arc::new(Mutex::new(controller)), threads })
    }

    /// Continues the rollouts in the state folder on a thread.
    ///
    /// # Errors
    /// As [`RolloutService::open`]; a thread cannot be started.
    pub fn start(config: &Config, context: RolloutContext) -> Result<Self> {
        let service = Self::open(config, context)?;
        let controller = service.controller.clone();
        service.threads.spawn("rollouts", move |stop| {
            // A command that panics ends this thread, too, and the process is not ready then.
            let held = || controller.lock().expect("no command has panicked");
            while !stop.is_requested() {
                let pause = held().step();
                clock::sleep(pause);
            }
            held().stop_replays();
        })?;
        Ok(service)
    }

    /// Begins and advances what can be; returns the time until the next look.
    ///
    /// # Errors
    /// An earlier step has panicked.
    pub fn step(&self) -> Result<Duration> {
        Ok(self.controller()?.step())
    }

    /// Accepts a push and starts its rollout. Blocks while the component is compiled. Returns the
    /// rollout, and whether it is new.
    ///
    /// # Errors
    /// As [`Acceptor::accept`]; refused while another rollout of the expert is under way.
    pub fn push(&self, name: &str, version: &str, body: &[u8]) -> Result<(Rollout, bool)> {
        let (other, files) = self.under_way(name);
        if let Some(other) = other.filter(|other| other.version() != version) {
            return Err(Error::refused(format!(
                "the rollout of {} {} is under way ({}); wait for its end, or roll it back",
                other.name(),
                other.version(),
                other.step.word()
            )));
        }
        match self.acceptor.accept(name, version, body, files)? {
            None => {
                if self.rollout(name, version).is_none() {
                    self.command()?.begin_recorded()?;
                }
                let rollout = self.rollout(name, version);
                let gone = || {
                    Error::refused(format!(
                        "{name} {version} was pushed before, and its rollout is forgotten; sign it anew to start another one"
                    ))
                };
                Ok((rollout.ok_or_else(gone)?, false))
            }
            Some(begun) => {
                if let Some(known) = self.rollout(name, version)
                    && !known.step.is_over()
                {
                    self.acceptor.repository.begun(&begun.pending.rollout)?;
                    return Ok((known, false));
                }
                let rollout = begun.pending.rollout.clone();
                self.command()?.begin_accepted(begun)?;
                Ok((rollout, true))
            }
        }
    }

    /// The rollout of an expert that is under way, and the files of all that are.
    fn under_way(&self, name: &str) -> (Option<Rollout>, HashSet<PathBuf>) {
        let all = lock(&self.all);
        let under_way = || all.values().filter(|rollout| rollout.is_under_way());
        let files = under_way().flat_map(|rollout| files(&rollout.expert)).collect();
        (under_way().find(|rollout| rollout.name() == name).cloned(), files)
    }

    /// The rollout of a version, if it was pushed to this daemon.
    pub fn rollout(&self, name: &str, version: &str) -> Option<Rollout> {
        lock(&self.all).get(&(name.to_owned(), version.to_owned())).cloned()
    }

    /// The rollouts of an expert, the newest last.
    pub fn of(&self, name: &str) -> Vec<Rollout> {
        let mut own: Vec<Rollout> =
            lock(&self.all).values().filter(|rollout| rollout.name() == name).cloned().collect();
        own.sort_by_key(|rollout| rollout.begun_ms);
        own
    }

    /// Gives an expert's users back to the version before: ends its rollout, and one that is
    /// recorded and has not begun, or undoes the last promotion if there is neither. Blocks.
    /// Returns what was ended and who answers now, in words.
    ///
    /// # Errors
    /// Refused: there is no version before, or another daemon recorded the push. The message says
    /// what was ended all the same.
    pub fn roll_back(&self, name: &str) -> Result<String> {
        self.command()?.roll_back(name)
    }

    /// Stops the controller after its current step; rollouts continue at the next start.
    pub fn stop(&self) {
        self.threads.stop();
    }

    /// The controller for a command, once it has tried to begin what is recorded.
    fn command(&self) -> Result<MutexGuard<'_, RolloutController>> {
        if self.threads.stop.is_requested() {
            return Err(Error::unreachable("this daemon is about to end; try again later"));
        }
        let mut controller = self.controller()?;
        controller.begin_due(clock::instant());
        Ok(controller)
    }

    fn controller(&self) -> Result<MutexGuard<'_, RolloutController>> {
        let ended = |_| Error::internal("the rollout controller has stopped; see the daemon's log");
        self.controller.lock().map_err(ended)
    }
}

#[cfg(test)]
mod tests;
