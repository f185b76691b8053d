//! The streams that a joiner writes: what is there already is passed over, the
//! rest is appended in batches, however often the engine fails meanwhile.

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use super::{JoinMetrics, Joined, Joiner, Outcome, made::Sink};
use crate::engine::{Appender, Engine, MAX_RECORD_BYTES, Record, Topic};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::clock::now_ms;
use hypercast_core::shutdown::Shutdown;

/// Records, and bytes of them, that are appended together.
const WRITE: (usize, usize) = (1024, 4 << 20);

/// The longest pause before an engine that failed is asked again.
const PAUSE: Duration = Duration::from_secs(2);

/// Where records go.
pub(super) struct Outputs {
    pub(super) joined: Output,
    pub(super) outcomes: Output,
    pub(super) metrics: Arc<dyn JoinMetrics>,
    pub(super) stop: Shutdown,
    failure: Option<Error>,
}

/// One stream that the joiner writes.
pub(super) struct Output {
    topic: Topic,
    engine: Arc<dyn Engine>,
    appender: Arc<dyn Appender>,
    /// Records made since the first event.
    pub(super) made: u64,
    /// Records that the stream holds.
    pub(super) end: u64,
    batch: Vec<Record>,
    bytes: usize,
    ingested_ms: Vec<i64>,
}

impl Outputs {
    /// Opens both streams for writing.
    pub(super) fn open(
        engine: &Arc<dyn Engine>,
        metrics: Arc<dyn JoinMetrics>,
        stop: Shutdown,
    ) -> Result<Outputs> {
        let joined = Output::open(engine, Topic::joined())?;
        let outcomes = Output::open(engine, Topic::outcomes())?;
        Ok(Outputs { joined, outcomes, metrics, stop, failure: None })
    }

    /// Whether all that the streams hold was made again.
    pub(super) fn caught_up(&self) -> bool {
        self.joined.made >= self.joined.end && self.outcomes.made >= self.outcomes.end
    }

    /// Finds where the joiner stands in its streams.
    pub(super) fn begin(&mut self, joiner: &Joiner) -> Result<()> {
        let counts = joiner.counts();
        let both = [(&mut self.joined, counts.joined), (&mut self.outcomes, counts.outcomes)];
        for (output, made) in both {
            if output.end < made {
                return Err(Error::invalid(format!(
                    "the joiner made {made} records of stream {}, which holds {}; restore the stream, or begin anew without state and streams",
                    output.topic, output.end
                )));
            }
            output.made = made;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        self.outcomes_flush();
        self.joined_flush();
        self.failure.take().map_or(Ok(()), Err)
    }

    fn joined_flush(&mut self) {
        let flushed = self.joined.flush("joined", &*self.metrics, &self.stop);
        self.failure = self.failure.take().or(flushed.err());
    }

    fn outcomes_flush(&mut self) {
        let flushed = self.outcomes.flush("told", &*self.metrics, &self.stop);
        self.failure = self.failure.take().or(flushed.err());
    }
}

impl Sink for Outputs {
    fn joined(&mut self, joined: Joined) {
        if !self.joined.is_new() || self.failure.is_some() {
            return;
        }
        let ingested_ms = joined.joined().ingested_ms;
        match shortened(joined) {
            Ok(payload) => self.joined.push(payload, ingested_ms),
            Err(error) => self.failure = Some(error),
        }
        if self.joined.is_full() {
            self.joined_flush();
        }
    }

    fn outcome(&mut self, outcome: Outcome) {
        if !self.outcomes.is_new() || self.failure.is_some() {
            return;
        }
        match encode(&outcome) {
            Ok(payload) => self.outcomes.push(payload, outcome.ingested_ms),
            Err(error) => self.failure = Some(error),
        }
        if self.outcomes.is_full() {
            self.outcomes_flush();
        }
    }
}

impl Output {
    fn open(engine: &Arc<dyn Engine>, topic: Topic) -> Result<Output> {
        let appender = engine.appender(&topic)?;
        let end = engine.span(&topic)?.end;
        let (engine, batch) = (engine.clone(), Vec::new());
        Ok(Output {
            topic,
            engine,
            appender,
            made: 0,
            end,
            batch,
            bytes: 0,
            ingested_ms: Vec::new(),
        })
    }

    /// Counts a record: whether it is not in the stream yet.
    fn is_new(&mut self) -> bool {
        self.made += 1;
        self.made > self.end
    }

    fn push(&mut self, payload: Vec<u8>, ingested_ms: i64) {
        self.bytes += payload.len();
        self.batch.push(Record { id: 0, payload });
        self.ingested_ms.push(ingested_ms);
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= WRITE.0 || self.bytes >= WRITE.1
    }

    /// Appends what is gathered, however often the engine fails meanwhile, unless the process is to stop.
    fn flush(&mut self, stage: &str, metrics: &dyn JoinMetrics, stop: &Shutdown) -> Result<()> {
        let mut pause = Duration::from_millis(50);
        let mut unsure = false;
        while !self.batch.is_empty() {
            let error = match self.appender.append_at(self.end, &self.batch) {
                Ok(Some(appended)) => {
                    self.end = appended.end;
                    self.batch.clear();
                    break;
                }
                Ok(None) => None,
                Err(error) => Some(error),
            };
            // Only an attempt that failed can have made the stream longer.
            unsure |= error.is_some();
            if !unsure {
                return Err(self.other_writer());
            }
            // What failed may have been appended all the same.
            match self.engine.span(&self.topic) {
                Ok(kept) => self.found(kept.end)?,
                Err(again) => tracing::warn!(%again, topic = %self.topic, "no answer"),
            }
            let Some(error) = error else { continue };
            if self.batch.is_empty() {
                break;
            }
            if stop.is_requested() {
                return Err(error);
            }
            tracing::warn!(%error, topic = %self.topic, "cannot append; trying again");
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE);
        }
        let now = now_ms();
        for ingested_ms in self.ingested_ms.drain(..) {
            metrics.event_latency(stage, now - ingested_ms);
        }
        self.bytes = 0;
        Ok(())
    }

    /// The stream ends here: the first records of the batch are in it if it is longer than it was.
    fn found(&mut self, end: u64) -> Result<()> {
        let there = end.checked_sub(self.end).filter(|&there| there <= self.batch.len() as u64);
        match there {
            Some(there) => {
                self.batch.drain(..there as usize);
                self.end = end;
                Ok(())
            }
            None => Err(self.other_writer()),
        }
    }

    fn other_writer(&self) -> Error {
        Error::invalid(format!(
            "stream {} does not end at {}, where this joiner left it; another joiner writes to it: stop one",
            self.topic, self.end
        ))
    }
}

/// A joined record, without the oldest half of its history as often as it must be to fit.
fn shortened(mut joined: Joined) -> Result<Vec<u8>> {
    loop {
        let payload = encode(&joined)?;
        if payload.len() <= MAX_RECORD_BYTES {
            return Ok(payload);
        }
        let (Joined::Example(of) | Joined::Correction(of)) = &mut joined;
        let history = &mut of.example.history;
        if history.is_empty() {
            let (request, bytes) = (of.example.request, payload.len());
            return Err(Error::invalid(format!(
                "request {request} makes a record of {bytes} bytes; at most {MAX_RECORD_BYTES} fit: lower fm.max_targets"
            )));
        }
        tracing::warn!(
            request = of.example.request,
            events = history.len(),
            "a history is too long for a record; its oldest half is left out"
        );
        history.drain(..history.len().div_ceil(2));
    }
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value)
        .map_err(|error| Error::invalid(format!("a joined record cannot be written: {error}")))
}
