//! The stream of joined examples as its followers read it: decoded, with content vectors put back
//! ([`ContentReader`]), and clipped to the ranges of its schema, because another release may have
//! written the stream. A record that cannot be read or does not fit the schema is set aside. An
//! engine that fails is asked again for a while, and its failing is no end. Missing records are
//! passed once the follower has saved that.

use std::{sync::Arc, time::Duration};

use hypercast_fm::{
    batch::BatchBuilder,
    example::{Example, Outcome},
    row_keys::RowKeys,
    spec::FmSpec,
};

use super::content_reader::ContentReader;
use crate::ServiceContext;
use crate::error::{Error, Result};
use crate::job_metrics::JobMetrics;
use hypercast_config::Config;
use hypercast_core::{clock, shutdown::Shutdown};
use hypercast_data::ranked_place::RankedPlace;
use hypercast_data::schema::{ColumnRanges, ColumnUpgrade, CoreColumns, Schema, example_spec};
use hypercast_stream::dead_letters::{
    DeadLetter, DeadLetterQueue, LetterReader, LetterScope, SetAsideRate, UnusableRecord,
};
use hypercast_stream::join::{ContentPlace, JoinedExample, JoinedRecord};
use hypercast_stream::streams::{
    GapHandling, StreamEngine, StreamFollower, StreamPlace, StreamRecord, StreamTrail, Topic,
};

/// How long it waits after an engine has failed.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row after which it gives up.
pub(super) const MOST_FAILURES: u32 = 120;

/// An example or a correction, with its position.
pub(super) struct PositionedExample {
    pub(super) example: Example,
    /// Where its targets were ranked; empty if none is known.
    pub(super) ranked: Vec<Option<RankedPlace>>,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
    /// Where it was read.
    pub(super) key: RecordKey,
    /// The place after it.
    pub(super) end: StreamPlace,
}

/// A record's position in its source, and which attempt at it this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordKey {
    pub(super) position: u64,
    /// How often it was tried again before; 0 for a record that the stream brings.
    pub(super) retries: u32,
    /// CRC-32 of its content; none of a row of a feature log.
    pub(super) checksum: Option<u32>,
}

impl RecordKey {
    /// Of a record of a stream.
    fn of(record: &StreamRecord, retries: u32) -> RecordKey {
        let StreamPlace { checksum, .. } = StreamPlace::after(record);
        RecordKey { position: record.position, retries, checksum }
    }

    /// The record as one that cannot be used.
    pub(super) fn unusable(self, example: &Example, reason: String) -> UnusableRecord {
        let RecordKey { position, retries, checksum } = self;
        UnusableRecord { position, retries, request: Some(example.request), checksum, reason }
    }

    /// A record that cannot be read.
    pub(super) fn unreadable(self, why: &Error) -> UnusableRecord {
        let RecordKey { position, retries, checksum } = self;
        UnusableRecord { position, retries, request: None, checksum, reason: why.to_string() }
    }
}

/// Where a follower of `joined` begins.
#[derive(Debug, Clone, Default)]
pub(super) struct JoinedPosition {
    /// In `joined`; none for the first record that is kept.
    pub(super) joined: Option<StreamTrail>,
    /// In the orders to try records again; none for those that come from now on.
    pub(super) orders: Option<u64>,
}

/// What is told of records that a job cannot use, or that are missing.
#[derive(Debug, Clone)]
pub(super) struct RecordReports {
    /// Counts those that are set aside.
    pub(super) rate: Arc<SetAsideRate>,
    /// What is done if some are missing.
    pub(super) gaps: GapHandling,
    /// Ends the repetition of what fails.
    pub(super) stop: Shutdown,
}

impl RecordReports {
    /// In the metrics of a job, once for each.
    pub(super) fn of(metrics: &JobMetrics, config: &Config, stop: &Shutdown) -> RecordReports {
        let (rate, gaps) = (metrics.set_aside.clone(), metrics.gaps(config.engine.on_gap));
        RecordReports { rate, gaps, stop: stop.clone() }
    }
}

/// What a reader finds next.
pub(super) enum JoinedRead {
    /// Records that can be used, at least one.
    Records(Vec<PositionedExample>),
    /// Nothing that can be used, which says nothing about what is there: the engine failed, or the
    /// records were set aside.
    Later,
    /// Nothing that is there already.
    End,
    /// Missing records.
    Gap(PassedGap),
    /// The job is to stop. What was read meanwhile is left to whoever goes on: it may be of a
    /// schema that has grown.
    Stopped,
}

/// Missing records that a reader passes, because `engine.on_gap` says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PassedGap {
    /// Where it goes on.
    pub(super) to: StreamPlace,
    /// Whether that is before where it stood, so that records come again, or others under their
    /// positions.
    pub(super) is_back: bool,
}

/// Records that were read, in their order.
#[derive(Default)]
struct DecodedRecords {
    usable: Vec<PositionedExample>,
    unusable: Vec<UnusableRecord>,
}

/// Follows the stream `joined`, and waits out an engine that fails for a while.
pub(super) struct JoinedReader {
    engine: Arc<dyn StreamEngine>,
    stream: StreamFollower,
    letters: DeadLetterQueue,
    /// Says whether an example fits the schema.
    fits: BatchBuilder,
    contents: ContentReader,
    ranges: ColumnRanges,
    upgrade: ColumnUpgrade,
    /// What of examples its caller is shown, if not all.
    shown: Option<CoreColumns>,
    failures: u32,
    /// What its caller has not saved yet.
    gap: Option<PassedGap>,
    stop: Shutdown,
}

impl JoinedReader {
    /// Reads for `reader`, in whose name records are set aside and counted.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub(super) fn open(
        context: ServiceContext<'_>,
        reader: &LetterReader,
        position: JoinedPosition,
        reports: RecordReports,
    ) -> Result<JoinedReader> {
        let ServiceContext { dataset, config, engine } = context;
        let (topic, JoinedPosition { joined, orders }) = (Topic::joined(), position);
        let contents = ContentReader::new(engine.clone(), dataset, &config.features);
        let RecordReports { rate, gaps, stop } = reports;
        let of = LetterScope { reader, source: topic.name() };
        let letters = DeadLetterQueue::open(engine.clone(), of, orders, rate, stop.clone())?;
        let spec = FmSpec { content: dataset.content, ..example_spec(&dataset.schema)? };
        let fits = BatchBuilder::new(&spec, &config.fm, RowKeys::Whole);
        let ranges = ColumnRanges::new(&dataset.schema);
        let upgrade = ColumnUpgrade::new(&dataset.schema);
        let stream = StreamFollower::open(engine.clone(), topic, joined, gaps)?;
        Ok(JoinedReader {
            engine,
            stream,
            letters,
            fits,
            contents,
            ranges,
            upgrade,
            shown: None,
            failures: 0,
            gap: None,
            stop,
        })
    }

    /// The same that shows examples as a trainer of the foundation model is shown them.
    pub(super) fn of_core(self, schema: &Schema) -> JoinedReader {
        JoinedReader { shown: Some(CoreColumns::for_trainer(schema)), ..self }
    }

    /// The place of the next record.
    pub(super) fn place(&self) -> StreamPlace {
        self.stream.place()
    }

    /// How far orders to try records again were read.
    pub(super) fn orders_position(&self) -> u64 {
        self.letters.position()
    }

    /// Sets records aside that its caller cannot use. The letters are durable when it returns.
    ///
    /// # Errors
    /// An engine that has failed for long.
    pub(super) fn set_aside(&self, records: Vec<UnusableRecord>) -> Result<()> {
        Ok(self.letters.set_aside(records)?)
    }

    /// Records that an operator had tried again since the last call.
    ///
    /// # Errors
    /// An engine that has failed for long.
    pub(super) fn retries(&mut self) -> Result<Vec<PositionedExample>> {
        let mut read = DecodedRecords::default();
        for letter in self.letters.orders() {
            let DeadLetter { position, retries, checksum, .. } = letter;
            match letter.record(&*self.engine) {
                Ok(payload) => {
                    let record = StreamRecord { position, stored_ms: None, payload };
                    self.decode(&record, retries, &mut read)?;
                }
                Err(why) => {
                    let key = RecordKey { position, retries, checksum };
                    read.unusable.push(key.unreadable(&why.into()));
                }
            }
        }
        self.usable(read)
    }

    /// The next records, for the first of which it waits. Where records are missing it says so
    /// again until [`JoinedReader::go_on`]: its caller first uses what it has read before, and
    /// saves where it goes on. A caller that is killed later would else stand where it was, in a
    /// stream that may have grown past that, and read records again or leave some out.
    ///
    /// # Errors
    /// Records that are missing if `engine.on_gap` is "stop", or an engine that has failed for
    /// long.
    pub(super) fn next(&mut self, most: usize, wait: Duration) -> Result<JoinedRead> {
        if let Some(gap) = self.gap {
            return Ok(JoinedRead::Gap(gap));
        }
        let before = self.place();
        let read = self.stream.next(most, wait).and_then(|records| {
            if !records.is_empty() || self.place() != before {
                return Ok(records);
            }
            self.stream.next_stored(most)
        });
        if self.stop.is_requested() {
            return Ok(JoinedRead::Stopped);
        }
        let records = match read {
            Ok(records) if records.is_empty() && self.place() != before => {
                let to = self.place();
                let gap = PassedGap { to, is_back: to.position < before.position };
                self.gap = Some(gap);
                if gap.is_back {
                    self.contents.forget();
                }
                return Ok(JoinedRead::Gap(gap));
            }
            Ok(records) => records,
            Err(error @ hypercast_stream::Error::Gap(_)) => return Err(error.into()),
            Err(error) => {
                self.retry(error.into())?;
                return Ok(JoinedRead::Later);
            }
        };
        self.failures = 0;
        if records.is_empty() {
            return Ok(JoinedRead::End);
        }
        let mut read = DecodedRecords::default();
        for record in &records {
            self.decode(record, 0, &mut read)?;
        }
        let usable = self.usable(read)?;
        Ok(if usable.is_empty() { JoinedRead::Later } else { JoinedRead::Records(usable) })
    }

    /// Goes on behind missing records.
    pub(super) fn go_on(&mut self) {
        self.gap = None;
    }

    /// Adds a record to those that were read, or its content vector to those that are known.
    ///
    /// # Errors
    /// As [`ContentReader::fill`].
    fn decode(
        &mut self,
        record: &StreamRecord,
        retries: u32,
        read: &mut DecodedRecords,
    ) -> Result<()> {
        let key = RecordKey::of(record, retries);
        let (correction, JoinedExample { mut example, ingested_ms, ranked }) =
            match JoinedRecord::decode(&record.payload) {
                Ok(JoinedRecord::Example(joined)) => (false, joined),
                Ok(JoinedRecord::Correction(joined)) => (true, joined),
                Ok(JoinedRecord::Content(content)) => {
                    self.contents.put(ContentPlace(record.position), content);
                    return Ok(());
                }
                Err(why) => {
                    read.unusable.push(key.unreadable(&why.into()));
                    return Ok(());
                }
            };
        self.restore(&mut example);
        self.contents.fill(&mut example)?;
        match self.fits.check(&example) {
            Ok(()) => {
                let end = StreamPlace::after(record);
                let example = match &self.shown {
                    Some(core) => core.into_core(example),
                    None => example,
                };
                let is_known = |outcome: &Outcome| {
                    outcome.known != 0 || outcome.values.iter().any(|value| !value.is_nan())
                };
                // Of what belongs to a surface: nothing is left to learn from.
                if correction && !example.targets.iter().any(|target| is_known(&target.outcome)) {
                    return Ok(());
                }
                read.usable.push(PositionedExample {
                    example,
                    ranked,
                    correction,
                    ingested_ms,
                    key,
                    end,
                });
            }
            Err(why) => read.unusable.push(key.unreadable(&why.into())),
        }
        Ok(())
    }

    /// Sets those aside that cannot be used.
    fn usable(&self, read: DecodedRecords) -> Result<Vec<PositionedExample>> {
        self.set_aside(read.unusable)?;
        Ok(read.usable)
    }

    fn retry(&mut self, error: Error) -> Result<()> {
        if self.engine.is_stopping() {
            // Its caller ends, and reads this at its next start.
            return Ok(());
        }
        self.failures += 1;
        if self.failures >= MOST_FAILURES {
            return Err(error);
        }
        tracing::warn!(%error, "the joined stream cannot be read; trying again");
        clock::sleep(RETRY_AFTER);
        Ok(())
    }

    fn restore(&self, example: &mut Example) {
        self.upgrade.example(example);
        let clipped = self.ranges.clip(example);
        if clipped > 0 {
            tracing::debug!(request = example.request, clipped, "numbers were beyond their ranges");
        }
    }
}

#[cfg(test)]
mod tests;
