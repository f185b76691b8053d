//! The two streams that a joiner writes. Records that the streams already have are skipped, the
//! others are appended in batches; failed appends are repeated.
//!
//! A joiner that goes on from a saved state compares what it skips with what is stored. The events
//! may have lost their tail and grown again since: what it makes of new ones has the numbers of
//! stored records, and would be lost if it were skipped by its number alone.

use std::{sync::Arc, time::Duration};

use hypercast_core::clock::{self, now_ms};
use hypercast_core::shutdown::Shutdown;
use hypercast_fm::example::Example;
use serde::Serialize;

use super::stored_records::{StoredDifference, StoredRecords};
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
    /// The position of the event that is joined now.
    pub(super) event: u64,
    gaps: GapHandling,
    /// The position in `joined` from which on the joiner counts otherwise than its streams, because
    /// it made another record than was stored.
    departed_from: Option<u64>,
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
    /// What the records that are made again are compared with, if they are.
    stored: Option<StoredRecords>,
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
        gaps: GapHandling,
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
                stored: None,
                batch: Vec::new(),
                bytes: 0,
                ingested_ms: Vec::new(),
            })
        };
        let (joined, outcomes) =
            (open(Topic::joined(), "joined")?, open(Topic::outcomes(), "told")?);
        Ok(OutputStreams { joined, outcomes, event: 0, gaps, departed_from: None, failure: None })
    }

    /// Whether the joiner has repeated all records that the streams have.
    pub(super) fn caught_up(&self) -> bool {
        self.joined.made >= self.joined.end && self.outcomes.made >= self.outcomes.end
    }

    /// Compares the joiner's counters with the streams. If a stream has lost records and the
    /// joiner is to go on, its counter becomes the stream's end; returns whether that was so.
    pub(super) fn begin(&mut self, joiner: &mut Joiner) -> Result<bool> {
        let counts = &mut joiner.counts;
        let both =
            [(&mut self.joined, &mut counts.joined), (&mut self.outcomes, &mut counts.outcomes)];
        let mut short = false;
        for (output, made) in both {
            if output.end < *made {
                let (topic, cause) = (output.topic.clone(), GapCause::Cut { end: output.end });
                self.gaps.settle(StreamGap { topic, position: *made, cause })?;
                *made = output.end;
                short = true;
            }
            output.made = *made;
        }
        joiner.contents.lose_from(joiner.counts.joined);
        Ok(short)
    }

    /// Compares what the joiner makes again from here on with what the streams have.
    pub(super) fn compare(&mut self) -> Result<()> {
        for output in [&mut self.joined, &mut self.outcomes] {
            let (topic, made) = (output.topic.clone(), output.made);
            output.stored = Some(StoredRecords::open(&*output.engine, topic, made)?);
        }
        Ok(())
    }

    /// Takes what the streams have as made, although the joiner cannot produce it again.
    pub(super) fn accept(&mut self, joiner: &mut Joiner) {
        self.depart();
        self.count(joiner);
    }

    /// Whether the joiner has departed from what is stored since the last call; then its counters
    /// become those of the streams. To be asked after each event: content vectors are found by what
    /// the joiner has counted.
    pub(super) fn departed(&mut self, joiner: &mut Joiner) -> bool {
        let Some(from) = self.departed_from.take() else { return false };
        self.count(joiner);
        joiner.contents.lose_from(from);
        true
    }

    fn depart(&mut self) {
        for output in [&mut self.joined, &mut self.outcomes] {
            output.made = output.made.max(output.end);
        }
    }

    fn count(&self, joiner: &mut Joiner) {
        joiner.counts.joined = self.joined.made;
        joiner.counts.outcomes = self.outcomes.made;
    }

    /// Tells a record that is not the one that is stored; if the joiner is to go on, this one and
    /// all that follow are new.
    fn settle(&mut self, difference: Option<StoredDifference>) -> Result<()> {
        let Some(StoredDifference { topic, position }) = difference else { return Ok(()) };
        tracing::error!("stream {topic}: what is made again is not the record at {position}");
        let (topic, cause) = (Topic::events(), GapCause::Unrepeated);
        self.gaps.settle(StreamGap { topic, position: self.event, cause })?;
        let from = self.joined.made;
        self.depart();
        self.departed_from = Some(from);
        Ok(())
    }

    fn take_joined(&mut self, joined: JoinedRecord) -> Result<()> {
        let (engine, ingested_ms) = (self.joined.engine.clone(), joined.ingested_ms());
        if let Some(stored) = self.joined.compared_with() {
            let difference = stored.compare_joined(&*engine, &joined)?;
            self.settle(difference)?;
        }
        if self.joined.is_new() {
            self.joined.push(shortened(joined)?, ingested_ms)?;
        }
        Ok(())
    }

    fn take_outcome(&mut self, outcome: &OutcomeRecord) -> Result<()> {
        let engine = self.outcomes.engine.clone();
        if let Some(stored) = self.outcomes.compared_with() {
            let difference = stored.compare_outcome(&*engine, outcome)?;
            self.settle(difference)?;
        }
        if self.outcomes.is_new() {
            self.outcomes.push(encode(outcome)?, outcome.ingested_ms)?;
        }
        Ok(())
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        let outcomes = self.outcomes.flush();
        let joined = self.joined.flush();
        self.failure.take().map_or(Ok(()), Err).and(outcomes).and(joined)
    }
}

impl JoinSink for OutputStreams {
    fn joined(&mut self, joined: JoinedRecord) {
        if self.failure.is_none() {
            self.failure = self.take_joined(joined).err();
        }
    }

    fn outcome(&mut self, outcome: OutcomeRecord) {
        if self.failure.is_none() {
            self.failure = self.take_outcome(&outcome).err();
        }
    }
}

impl OutputStream {
    /// What the next record is compared with; none if the stream does not have it yet.
    fn compared_with(&mut self) -> Option<&mut StoredRecords> {
        self.stored.as_mut().filter(|_| self.made < self.end)
    }

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
        let (JoinedRecord::Example(of) | JoinedRecord::Correction(of)) = &mut joined else {
            return Err(Error::internal("a content vector does not fit a record"));
        };
        let Example { request, history, targets, .. } = &mut of.example;
        let (events, rows) = (history.len(), targets.len());
        if events > 0 {
            history.drain(..events.div_ceil(2));
            tracing::warn!(request, events, "a record is too long; half of its history is removed");
        } else if rows > 0 {
            targets.truncate(rows / 2);
            of.ranked.truncate(rows / 2);
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
        let ranked = vec![None; example.targets.len()];
        let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1, ranked });
        let payload = shortened(joined).unwrap();
        assert!(payload.len() <= MAX_RECORD_BYTES);
        let stored = JoinedRecord::decode(&payload).unwrap();
        let stored = stored.joined().unwrap();
        assert_eq!((stored.example.targets.len(), stored.ranked.len()), (8, 8));
    }
}
