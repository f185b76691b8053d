//! Access to the registry's stream: reads it, follows it, and appends decisions so that no two
//! writers decide on the same state.

use std::time::Duration;

use hypercast_data::versioned;
use serde::Deserialize;

use super::{Change, Decision, Registry};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{
    GapCause, Record, StreamCursor, StreamEngine, StreamGap, StreamPlace, StreamRead, StreamRecord,
    Topic,
};

/// The version of a decision's format.
const FORMAT: u32 = 1;

/// The most decisions that one read returns.
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
    /// The engine cannot be read.
    pub fn read(&self) -> Result<Registry> {
        let mut follower = RegistryFollower::new(self.engine)?;
        follower.catch_up(self.engine)?;
        Ok(follower.registry)
    }

    /// Makes a decision on the current state and appends it; repeats this if another writer was
    /// faster. Returns the new state. A decision without changes appends nothing.
    ///
    /// # Errors
    /// The error of `decision`; the engine cannot be read or written; the state misses a decision
    /// ([`Registry::check_complete`]).
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
    cursor: StreamCursor,
    registry: Registry,
}

impl RegistryFollower {
    /// A follower from the first decision on, which has read nothing yet.
    ///
    /// # Errors
    /// The engine cannot be read.
    pub fn new(engine: &dyn StreamEngine) -> Result<Self> {
        let cursor = StreamCursor::open(engine, &Topic::versions(), StreamPlace::at(0))?;
        Ok(Self { cursor, registry: Registry::default() })
    }

    /// The state as far as it was read.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The number of decisions up to where it has read, with those that are missing.
    pub fn position(&self) -> u64 {
        self.cursor.place().position
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
            self.catch_up(engine)?;
            self.registry.check_complete()?;
            let changes = decision(&self.registry)?;
            if changes.is_empty() {
                return Ok(false);
            }
            let decision = versioned::to_json(&Decision::new(changes), FORMAT);
            let payload = decision.to_string().into_bytes();
            let (end, record) = (self.position(), Record { id: 0, payload });
            if engine.append_at(&Topic::versions(), end, &[record])?.is_some() {
                // Reads the decision back, so that this follower has applied it, too.
                self.catch_up(engine)?;
                return Ok(true);
            }
        }
    }

    /// Reads all decisions that the stream has.
    ///
    /// # Errors
    /// See [`RegistryFollower::poll`].
    pub fn catch_up(&mut self, engine: &dyn StreamEngine) -> Result<()> {
        loop {
            let read = self.cursor.next_stored(engine, READ_RECORDS)?;
            if !self.take(read) {
                return Ok(());
            }
        }
    }

    /// Reads further decisions, after waiting up to `wait` for the first; true if there were any,
    /// or some are missing. One that is missing or cannot be applied is logged and kept in mind
    /// ([`Registry::unapplied`]).
    ///
    /// # Errors
    /// The engine cannot be read.
    pub fn poll(&mut self, engine: &dyn StreamEngine, wait: Duration) -> Result<bool> {
        let read = self.cursor.next(engine, READ_RECORDS, wait)?;
        Ok(self.take(read))
    }

    fn take(&mut self, read: StreamRead) -> bool {
        match read {
            StreamRead::Records(records) => {
                records.iter().for_each(|stored| self.apply(stored));
                !records.is_empty()
            }
            StreamRead::Gap(gap) => {
                self.pass(&gap);
                true
            }
        }
    }

    fn apply(&mut self, stored: &StreamRecord) {
        let applied = versioned::from_json(&stored.payload, FORMAT)
            .map_err(|error| Error::internal(format!("it is not a decision ({error})")))
            .and_then(|decision: Decision| self.registry.apply(&decision));
        if let Err(error) = applied {
            let record = format!("stream {}, record {}", Topic::versions(), stored.position);
            let why = format!("{record}: {error}; {}", writer(&stored.payload));
            tracing::error!("a decision is left out: {why}");
            self.registry.leave_out(1, why);
        }
    }

    /// Notes decisions that the stream has lost. What follows them applies to what was decided
    /// before, unless the stream has another past now: then that counts alone.
    fn pass(&mut self, gap: &StreamGap) {
        if matches!(gap.cause, GapCause::Changed { .. }) {
            self.registry = Registry::default();
        }
        let why = format!(
            "{gap}; stop what uses the registry and restore this stream, or remove it, start, and \
             register and promote again"
        );
        tracing::error!("decisions are missing: {why}");
        self.registry.leave_out(gap.missing(), why);
    }
}

/// Who wrote a record that cannot be applied, as far as the record says it.
fn writer(payload: &[u8]) -> String {
    /// What a decision of any version has.
    #[derive(Deserialize)]
    struct DecisionWriter {
        made_by: String,
    }
    let own = env!("CARGO_PKG_VERSION");
    match serde_json::from_slice(payload) {
        Ok(DecisionWriter { made_by }) if made_by != own => {
            format!("hypercast {made_by} wrote it and this is {own}: install {made_by}")
        }
        _ => format!("it is damaged, or a version newer than this {own} wrote it: install that"),
    }
}
