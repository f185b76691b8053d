//! The two streams that a joiner writes. Records that the streams already have are skipped, the
//! others are appended in batches; failed appends are repeated.

use std::{sync::Arc, time::Duration};

use hypercast_core::clock::{self, now_ms};
use hypercast_core::shutdown::Shutdown;
use hypercast_fm::example::Example;
use serde::Serialize;

use super::{JoinMetrics, JoinSink, JoinedRecord, Joiner, OutcomeRecord};
use crate::error::{CommonErrors as _, Error, Result};
use crate::streams::{
    Appender, GapCause, GapHandling, MAX_RECORD_BYTES, Record, StreamEngine, StreamGap, Topic,
};

/// The number of records that are appended together.
const BATCH_RECORDS: usize = 1024;

/// The bytes that are appended together.
const BATCH_BYTES: usize = 4 << 20;

/// How long to wait for records that the stream says it has.
const READ_WAIT: Duration = Duration::from_secs(1);

/// The longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The streams `joined` and `outcomes`.
pub(super) struct OutputStreams {
    pub(super) joined: OutputStream,
    pub(super) outcomes: OutputStream,
    /// The first failure, for [`OutputStreams::flush`].
    failure: Option<Error>,
}

/// One of the output streams, with its writer.
pub(super) struct OutputStream {
    topic: Topic,
    /// The label of its latency metric.
    stage: &'static str,
    engine: Arc<dyn StreamEngine>,
    appender: Arc<dyn Appender>,
    metrics: Arc<dyn JoinMetrics>,
    stop: Shutdown,
    /// Records that the joiner wrote since the first event.
    pub(super) made: u64,
    /// The end of the stream.
    pub(super) end: u64,
    batch: Vec<Record>,
    bytes: usize,
    ingested_ms: Vec<i64>,
}

impl OutputStreams {
    /// Opens both streams for writing.
    pub(super) fn open(
        engine: &Arc<dyn StreamEngine>,
        metrics: &Arc<dyn JoinMetrics>,
        stop: &Shutdown,
    ) -> Result<OutputStreams> {
        let open = |topic: Topic, stage| -> Result<OutputStream> {
            Ok(OutputStream {
                appender: engine.appender(&topic)?,
                end: engine.span(&topic)?.end,
                engine: engine.clone(),
                metrics: metrics.clone(),
                stop: stop.clone(),
                topic,
                stage,
                made: 0,
                batch: Vec::new(),
                bytes: 0,
                ingested_ms: Vec::new(),
            })
        };
        let (joined, outcomes) =
            (open(Topic::joined(), "joined")?, open(Topic::outcomes(), "told")?);
        Ok(OutputStreams { joined, outcomes, failure: None })
    }

    /// Whether the joiner has repeated all records that the streams have.
    pub(super) fn caught_up(&self) -> bool {
        self.joined.made >= self.joined.end && self.outcomes.made >= self.outcomes.end
    }

    /// Compares the joiner's counters with the streams. If a stream has lost records and the
    /// joiner is to go on, its counter becomes the stream's end; returns whether that was so.
    pub(super) fn begin(&mut self, joiner: &mut Joiner, gaps: &GapHandling) -> Result<bool> {
        let counts = &mut joiner.counts;
        let both =
            [(&mut self.joined, &mut counts.joined), (&mut self.outcomes, &mut counts.outcomes)];
        let mut short = false;
        for (output, made) in both {
            if output.end < *made {
                let (topic, cause) = (output.topic.clone(), GapCause::Cut { end: output.end });
                gaps.settle(StreamGap { topic, position: *made, cause })?;
                *made = output.end;
                short = true;
            }
            output.made = *made;
        }
        Ok(short)
    }

    /// Takes what the streams have as made, although the joiner cannot produce it again.
    pub(super) fn accept(&mut self, joiner: &mut Joiner) {
        for (output, made) in [
            (&mut self.joined, &mut joiner.counts.joined),
            (&mut self.outcomes, &mut joiner.counts.outcomes),
        ] {
            output.made = output.made.max(output.end);
            *made = output.made;
        }
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        let outcomes = self.outcomes.flush();
        let joined = self.joined.flush();
        self.failure.take().map_or(Ok(()), Err).and(outcomes).and(joined)
    }
}

impl JoinSink for OutputStreams {
    fn joined(&mut self, joined: JoinedRecord) {
        let ingested_ms = joined.joined().ingested_ms;
        if self.joined.is_new() && self.failure.is_none() {
            let pushed =
                shortened(joined).and_then(|payload| self.joined.push(payload, ingested_ms));
            self.failure = pushed.err();
        }
    }

    fn outcome(&mut self, outcome: OutcomeRecord) {
        if self.outcomes.is_new() && self.failure.is_none() {
            let pushed = encode(&outcome)
                .and_then(|payload| self.outcomes.push(payload, outcome.ingested_ms));
            self.failure = pushed.err();
        }
    }
}

impl OutputStream {
    /// Counts a record; true if the stream does not have it yet.
    fn is_new(&mut self) -> bool {
        self.made += 1;
        self.made > self.end
    }

    /// Adds a record to the batch and appends the batch if it is full.
    fn push(&mut self, payload: Vec<u8>, ingested_ms: i64) -> Result<()> {
        self.bytes += payload.len();
        self.batch.push(Record { id: 0, payload });
        self.ingested_ms.push(ingested_ms);
        if self.batch.len() >= BATCH_RECORDS || self.bytes >= BATCH_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Appends the batch. Repeats failed appends until they succeed or the process shuts down.
    fn flush(&mut self) -> Result<()> {
        let mut pause = Duration::from_millis(50);
        let mut may_be_stored = false;
        while !self.batch.is_empty() {
            let error = match self.appender.append_at(self.end, &self.batch) {
                Ok(Some(appended)) => {
                    self.end = appended.end;
                    self.batch.clear();
                    break;
                }
                // Only after a failed attempt can the stream be longer than known.
                Ok(None) if !may_be_stored => return Err(self.other_writer()),
                Ok(None) => self.other_writer(),
                Err(error) => error,
            };
            // A failed append may have been stored nevertheless.
            may_be_stored = true;
            match self.stored_records() {
                Ok(Some(stored)) => {
                    self.batch.drain(..stored);
                    self.end += stored as u64;
                }
                Ok(None) => return Err(self.other_writer()),
                Err(again) => {
                    tracing::warn!(%again, topic = %self.topic, "cannot query the stream");
                }
            }
            if self.batch.is_empty() {
                break;
            }
            if self.stop.is_requested() {
                return Err(error);
            }
            tracing::warn!(%error, topic = %self.topic, "cannot append; trying again");
            clock::sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        let now = now_ms();
        for ingested_ms in self.ingested_ms.drain(..) {
            self.metrics.event_latency(self.stage, now - ingested_ms);
        }
        self.bytes = 0;
        Ok(())
    }

    /// How many of the batch's first records the stream has behind the end that was known; none if
    /// what it has there is not from this batch.
    fn stored_records(&self) -> Result<Option<usize>> {
        let end = self.engine.span(&self.topic)?.end;
        let batch = self.batch.len() as u64;
        let Some(stored) = end.checked_sub(self.end).filter(|&stored| stored <= batch) else {
            return Ok(None);
        };
        let (stored, mut found) = (stored as usize, 0);
        let mut reader = self.engine.reader(&self.topic, self.end)?;
        while found < stored {
            let records = reader.next(stored - found, READ_WAIT)?;
            if records.is_empty() {
                return Err(Error::unreachable(format!(
                    "stream {} has {end} records, but gives only {}",
                    self.topic,
                    self.end + found as u64
                )));
            }
            let own = &self.batch[found..found + records.len()];
            if own.iter().zip(&records).any(|(own, stored)| own.payload != stored.payload) {
                return Ok(None);
            }
            found += records.len();
        }
        Ok(Some(stored))
    }

    fn other_writer(&self) -> Error {
        Error::refused(format!(
            "stream {} does not end at {}, where this joiner left it: another joiner writes to it, \
             or it lost its tail; stop one of them, or restart this one",
            self.topic, self.end
        ))
    }
}

/// Encodes a joined record. While it is too long, the older half of its history is removed, and
/// then the second half of its targets: a record that cannot be stored would stop the joiner for
/// good.
pub(super) fn shortened(mut joined: JoinedRecord) -> Result<Vec<u8>> {
    loop {
        let payload = encode(&joined)?;
        if payload.len() <= MAX_RECORD_BYTES {
            return Ok(payload);
        }
        let (JoinedRecord::Example(of) | JoinedRecord::Correction(of)) = &mut joined;
        let Example { request, history, targets, .. } = &mut of.example;
        let (events, rows) = (history.len(), targets.len());
        if events > 0 {
            history.drain(..events.div_ceil(2));
            tracing::warn!(request, events, "a record is too long; half of its history is removed");
        } else if rows > 0 {
            targets.truncate(rows / 2);
            tracing::warn!(
                request,
                rows,
                "a record is too long; half of its targets are removed: lower fm.max_targets"
            );
        } else {
            return Err(Error::refused(format!(
                "the user of request {request} alone has {} bytes; at most {MAX_RECORD_BYTES} fit",
                payload.len()
            )));
        }
    }
}

pub(super) fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_allocvec(value)
        .map_err(|error| Error::internal(format!("cannot encode a joined record: {error}")))
}

#[cfg(test)]
mod tests {
    use hypercast_fm::example::{Item, Outcome, Target};

    use super::super::JoinedExample;
    use super::*;

    #[test]
    fn a_request_that_does_not_fit_a_record_keeps_as_many_targets_as_do() {
        let item = Arc::new(Item { ids: vec![u64::MAX; 10_000], ..Item::default() });
        let target = Target {
            item,
            ids: vec![],
            features: vec![],
            outcome: Outcome::UNKNOWN,
            truth: vec![],
        };
        let example = Example {
            request: 5,
            user: Arc::default(),
            surface: 0,
            time_ms: 1,
            history: Vec::new(),
            targets: vec![target; 32],
        };
        let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1 });
        let payload = shortened(joined).unwrap();
        assert!(payload.len() <= MAX_RECORD_BYTES);
        assert_eq!(JoinedRecord::decode(&payload).unwrap().joined().example.targets.len(), 8);
    }
}
