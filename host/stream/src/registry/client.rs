//! Access to the registry's stream: reads it, follows it, and appends decisions so that no two
//! writers decide on the same state.

use std::time::Duration;

use hypercast_core::clock::now_ms;
use hypercast_data::versioned;

use super::{Change, Decision, Registry};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{Reader, Record, StreamEngine, Topic};

/// The version of a decision's format.
const FORMAT: u32 = 1;

/// Records per read.
const READ_RECORDS: usize = 1024;

/// Reads and changes the registry of a stream engine.
pub struct RegistryClient<'a> {
    engine: &'a dyn StreamEngine,
}

impl<'a> RegistryClient<'a> {
    /// A client of the engine's registry.
    pub fn new(engine: &'a dyn StreamEngine) -> Self {
        Self { engine }
    }

    /// Reads the current state.
    ///
    /// # Errors
    /// The engine cannot be read, or a record is not a decision.
    pub fn read(&self) -> Result<Registry> {
        let mut follower = RegistryFollower::new(self.engine)?;
        follower.catch_up()?;
        Ok(follower.registry)
    }

    /// Makes a decision on the current state and appends it; repeats this if another writer was
    /// faster. Returns the new state. A decision without changes appends nothing.
    ///
    /// # Errors
    /// The error of `decision`; or the engine cannot be read or written.
    pub fn decide<E: From<Error>>(
        &self,
        decision: impl Fn(&Registry) -> std::result::Result<Vec<Change>, E>,
    ) -> std::result::Result<Registry, E> {
        let mut follower = RegistryFollower::new(self.engine)?;
        follower.decide(self.engine, decision)?;
        Ok(follower.registry)
    }
}

/// Keeps a copy of the registry up to date with its stream.
pub struct RegistryFollower {
    reader: Box<dyn Reader>,
    registry: Registry,
}

impl RegistryFollower {
    /// A follower from the first decision on, which has read nothing yet.
    ///
    /// # Errors
    /// The engine cannot be read.
    pub fn new(engine: &dyn StreamEngine) -> Result<Self> {
        let reader = engine.reader(&Topic::versions(), 0)?;
        Ok(Self { reader, registry: Registry::default() })
    }

    /// The state as far as it was read.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The number of decisions that were read.
    pub fn position(&self) -> u64 {
        self.reader.position()
    }

    /// As [`RegistryClient::decide`], from the followed state; true if something was decided.
    ///
    /// # Errors
    /// See [`RegistryClient::decide`].
    pub fn decide<E: From<Error>>(
        &mut self,
        engine: &dyn StreamEngine,
        decision: impl Fn(&Registry) -> std::result::Result<Vec<Change>, E>,
    ) -> std::result::Result<bool, E> {
        loop {
            self.catch_up()?;
            let changes = decision(&self.registry)?;
            if changes.is_empty() {
                return Ok(false);
            }
            let made = Decision { at_ms: now_ms(), changes };
            let payload = versioned::to_json(&made, FORMAT).to_string().into_bytes();
            let (end, record) = (self.reader.position(), Record { id: 0, payload });
            if engine.append_at(&Topic::versions(), end, &[record])?.is_some() {
                // Reads the decision back, so that this follower has applied it, too.
                self.catch_up()?;
                return Ok(true);
            }
        }
    }

    /// Reads all available decisions.
    ///
    /// # Errors
    /// See [`RegistryFollower::poll`].
    pub fn catch_up(&mut self) -> Result<()> {
        while self.poll(Duration::ZERO)? {}
        Ok(())
    }

    /// Reads further decisions, after waiting up to `wait` for the first; true if there were any.
    ///
    /// # Errors
    /// The engine cannot be read, or a record is not a decision that this version knows.
    pub fn poll(&mut self, wait: Duration) -> Result<bool> {
        let records = self.reader.next(READ_RECORDS, wait)?;
        for stored in &records {
            let wrong = |why: String| {
                Error::internal(format!(
                    "stream {}, record {}: {why}; it is damaged, or another version of hypercast \
                     wrote it",
                    Topic::versions(),
                    stored.position
                ))
            };
            let decision: Decision = versioned::from_json(&stored.payload, FORMAT)
                .map_err(|error| wrong(format!("it is not a decision ({error})")))?;
            self.registry.apply(&decision).map_err(|error| wrong(error.to_string()))?;
        }
        Ok(!records.is_empty())
    }
}
