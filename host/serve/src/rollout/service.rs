//! The entry to rollouts: accepts pushes, reports their state, and passes commands to the
//! controller.

use std::{
    collections::HashSet,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        mpsc::{SyncSender, sync_channel},
    },
};

use hypercast_config::Config;

use crate::{
    error::{CommonErrors as _, Error, Result},
    rollout::{
        Rollout,
        accept::{AcceptedPush, Acceptor, files},
        controller::RolloutController,
        replay::ReplayFn,
        serving::VersionLookup,
        state::{RolloutFiles, RolloutMap},
    },
    threads::{ThreadGroup, lock},
};

/// Most commands that wait.
const COMMANDS: usize = 8;

/// The rollouts of a daemon.
pub struct RolloutService {
    all: Arc<Mutex<RolloutMap>>,
    acceptor: Arc<Acceptor>,
    commands: SyncSender<RolloutCommand>,
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

/// A command to the controller, with a channel for its result.
pub(super) enum RolloutCommand {
    /// Start a rollout.
    Begin { begun: AcceptedPush, done: SyncSender<Result<()>> },
    /// Start the rollouts of pushes that were accepted and have not begun.
    BeginRecorded { done: SyncSender<Result<()>> },
    /// End the rollouts of an expert, or undo its last promotion.
    RollBack { name: String, done: SyncSender<Result<String>> },
}

impl RolloutService {
    /// Continues the rollouts in the state folder.
    ///
    /// # Errors
    /// Files or streams cannot be read; a thread cannot be started.
    pub fn start(config: &Config, context: RolloutContext) -> Result<Self> {
        let files = RolloutFiles::open(&config.paths.state.join("rollouts"))?;
        let all = Arc::new(Mutex::new(files.read()?));
        let (commands, asked) = sync_channel(COMMANDS);
        let (threads, acceptor) = (ThreadGroup::default(), context.acceptor.clone());
        let controller =
            RolloutController::new(config, context, files, all.clone(), threads.stop.clone())?;
        threads.spawn("rollouts", move |_| controller.run(&asked))?;
        Ok(Self { all, acceptor, commands, threads })
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
                    self.send(|done| RolloutCommand::BeginRecorded { done })?;
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
                self.send(|done| RolloutCommand::Begin { begun, done })?;
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
        self.send(|done| RolloutCommand::RollBack { name: name.to_owned(), done })
    }

    /// Stops the controller after its current step; rollouts continue at the next start.
    pub fn stop(&self) {
        self.threads.stop();
    }

    fn send<T>(&self, command: impl FnOnce(SyncSender<Result<T>>) -> RolloutCommand) -> Result<T> {
        let (done, outcome) = sync_channel(1);
        let ended = || Error::internal("the rollout controller has stopped; see the daemon's log");
        self.commands
            .try_send(command(done))
            .map_err(|_| Error::unreachable("too many commands are waiting; try again"))?;
        outcome.recv().map_err(|_| ended())?
    }
}

#[cfg(test)]
mod tests;
