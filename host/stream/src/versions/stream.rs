//! The registry in its stream: read it, follow it, and append decisions so that
//! no two writers decide on one state.

use std::time::Duration;

use super::{Change, Decision, ExpertVersion, FmVersion, Registry};
use crate::engine::{Engine, Reader, Record, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::clock::now_ms;

/// Records a read.
const MOST: usize = 1024;

/// The registry of an engine, to be read and changed.
pub struct Versions<'a> {
    engine: &'a dyn Engine,
}

impl<'a> Versions<'a> {
    /// The registry that an engine keeps.
    pub fn new(engine: &'a dyn Engine) -> Self {
        Self { engine }
    }

    /// What is registered now.
    ///
    /// # Errors
    /// An engine that cannot be read, or a record that is no decision.
    pub fn read(&self) -> Result<Registry> {
        let mut follower = Follower::new(self.engine)?;
        follower.catch_up()?;
        Ok(follower.registry)
    }

    /// Decides on what is registered now, and appends that; where another writer was faster, decides anew. Returns what is
    /// registered then. A decision without changes appends nothing.
    ///
    /// # Errors
    /// What `wish` says against it; an engine that cannot be read or written.
    pub fn decide<E: From<Error>>(
        &self,
        wish: impl Fn(&Registry) -> std::result::Result<Vec<Change>, E>,
    ) -> std::result::Result<Registry, E> {
        let mut follower = Follower::new(self.engine)?;
        follower.decide(self.engine, wish)?;
        Ok(follower.registry)
    }
}

/// Registers an FM version as training, for its trainer. It may be there already, with the same facts.
///
/// # Errors
/// See [`Registry::register_fm`] and [`Versions::decide`].
pub fn register_fm(engine: &dyn Engine, fm: &FmVersion) -> Result<()> {
    Versions::new(engine).decide(|registry| registry.register_fm(fm)).map(drop)
}

/// Registers an expert's version as training, for its trainer. It may be there already, with the same facts.
///
/// # Errors
/// See [`Registry::register_expert`] and [`Versions::decide`].
pub fn register_expert(engine: &dyn Engine, expert: &ExpertVersion) -> Result<()> {
    Versions::new(engine).decide(|registry| registry.register_expert(expert)).map(drop)
}

/// The registry as it changes.
pub struct Follower {
    reader: Box<dyn Reader>,
    registry: Registry,
}

impl Follower {
    /// From the first decision on; nothing is read yet.
    ///
    /// # Errors
    /// An engine that cannot be read.
    pub fn new(engine: &dyn Engine) -> Result<Self> {
        let reader = engine.reader(&Topic::versions(), 0)?;
        Ok(Self { reader, registry: Registry::default() })
    }

    /// What is registered, as far as was read.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Decisions that were read.
    pub fn position(&self) -> u64 {
        self.reader.position()
    }

    /// As [`Versions::decide`], for who follows anyway; whether anything was decided.
    ///
    /// # Errors
    /// See [`Versions::decide`].
    pub fn decide<E: From<Error>>(
        &mut self,
        engine: &dyn Engine,
        wish: impl Fn(&Registry) -> std::result::Result<Vec<Change>, E>,
    ) -> std::result::Result<bool, E> {
        loop {
            self.catch_up()?;
            let changes = wish(&self.registry)?;
            if changes.is_empty() {
                return Ok(false);
            }
            let decision = Decision { at_ms: now_ms(), changes };
            let end = self.reader.position();
            if engine.append_at(&Topic::versions(), end, &[record(&decision)?])?.is_some() {
                // Read back as anybody reads it, so that the reader passes it too.
                self.catch_up()?;
                return Ok(true);
            }
        }
    }

    /// Reads what is there.
    ///
    /// # Errors
    /// See [`Follower::poll`].
    pub fn catch_up(&mut self) -> Result<()> {
        while self.poll(Duration::ZERO)? {}
        Ok(())
    }

    /// Reads further decisions, for which it waits so long; whether there were any.
    ///
    /// # Errors
    /// An engine that cannot be read, or a record that is no decision of this build's kind.
    pub fn poll(&mut self, wait: Duration) -> Result<bool> {
        let records = self.reader.next(MOST, wait)?;
        for stored in &records {
            let wrong = |why: String| {
                Error::invalid(format!(
                    "stream {}, record {}: {why}; it was written by another version of hypercast, or damaged",
                    Topic::versions(),
                    stored.position
                ))
            };
            let decision: Decision = serde_json::from_slice(&stored.payload)
                .map_err(|error| wrong(format!("no decision ({error})")))?;
            self.registry.apply(&decision).map_err(|error| wrong(error.to_string()))?;
        }
        Ok(!records.is_empty())
    }
}

fn record(decision: &Decision) -> Result<Record> {
    let payload = serde_json::to_vec(decision)
        .map_err(|error| Error::invalid(format!("a decision cannot be written: {error}")))?;
    Ok(Record { id: 0, payload })
}
