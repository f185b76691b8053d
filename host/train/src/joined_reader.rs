//! The stream of joined examples as its followers read it: decoded, with the content vectors of the
//! data set put back, and clipped to the ranges of its schema, because another release may have
//! written the stream. A record that cannot be read or does not fit the schema is set aside. An
//! engine that fails is asked again for a while, and its failing is no end.

use std::{collections::HashMap, sync::Arc, time::Duration};

use hypercast_fm::{
    batch::BatchBuilder,
    example::{Event, Example, Item},
};

use super::fm::dataset_spec;
use crate::ServiceContext;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::schema::ColumnRanges;
use hypercast_stream::dead_letters::{
    DeadLetter, DeadLetterQueue, LetterReader, SetAsideRate, UnusableRecord,
};
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::streams::{Reader, StreamEngine, StreamRecord, Topic};

/// How long it waits after an engine has failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row after which it gives up.
const MOST_FAILURES: u32 = 120;

/// An example or a correction, with its position.
pub(super) struct PositionedExample {
    pub(super) example: Example,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
    /// Where it was read.
    pub(super) key: RecordKey,
}

/// A record's position in its source, and which attempt at it this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordKey {
    pub(super) position: u64,
    /// How often it was tried again before; 0 for a record that the stream brings.
    pub(super) retries: u32,
}

impl RecordKey {
    /// The record as one that cannot be used.
    pub(super) fn unusable(self, example: &Example, reason: String) -> UnusableRecord {
        let RecordKey { position, retries } = self;
        UnusableRecord { position, retries, request: Some(example.request), reason }
    }

    /// A record that cannot be read.
    pub(super) fn unreadable(self, why: &Error) -> UnusableRecord {
        let RecordKey { position, retries } = self;
        UnusableRecord { position, retries, request: None, reason: why.to_string() }
    }
}

/// Where a follower of `joined` begins.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct JoinedPosition {
    /// In `joined`; none for the first record that is kept.
    pub(super) joined: Option<u64>,
    /// In the orders to try records again; none for those that come from now on.
    pub(super) orders: Option<u64>,
}

/// Follows the stream `joined`, and waits out an engine that fails for a while.
pub(super) struct JoinedReader {
    engine: Arc<dyn StreamEngine>,
    reader: Box<dyn Reader>,
    letters: DeadLetterQueue,
    /// Says whether an example fits the schema.
    fits: BatchBuilder,
    content: HashMap<u64, Arc<[f32]>>,
    ranges: ColumnRanges,
    failures: u32,
}

impl JoinedReader {
    /// Reads for `reader`, in whose name records are set aside and counted.
    ///
    /// # Errors
    /// A stream that ends before the position, or no longer has it.
    pub(super) fn open(
        context: ServiceContext<'_>,
        reader: &LetterReader,
        position: JoinedPosition,
        rate: Arc<SetAsideRate>,
    ) -> Result<JoinedReader> {
        let ServiceContext { dataset, config, engine } = context;
        let topic = Topic::joined();
        let span = engine.span(&topic)?;
        let from = position.joined.unwrap_or(span.start);
        if from < span.start || from > span.end {
            return Err(Error::invalid(format!(
                "stream {topic} holds positions {} to {}, and {from} is where to go on; what was written so far is of another stream, or records are gone: begin in another folder",
                span.start, span.end
            )));
        }
        let with = dataset.items.values().filter(|item| !item.content.is_empty());
        let content = with.map(|item| (item.id, item.content.clone())).collect();
        let orders = position.orders;
        let letters = DeadLetterQueue::open(engine.clone(), reader, topic.name(), orders, rate)?;
        let fits = BatchBuilder::new(&dataset_spec(dataset)?, &config.fm);
        let reader = engine.reader(&topic, from)?;
        let ranges = ColumnRanges::new(&dataset.schema);
        Ok(JoinedReader { engine, reader, letters, fits, content, ranges, failures: 0 })
    }

    /// The position of the next record.
    pub(super) fn position(&self) -> u64 {
        self.reader.position()
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
        let orders = self.letters.orders();
        let read = orders.into_iter().map(|letter| {
            let DeadLetter { position, retries, .. } = letter;
            let key = RecordKey { position, retries };
            let read = letter.record(&*self.engine).map_err(Error::from);
            read.and_then(|payload| self.decode(key, &payload)).map_err(|why| key.unreadable(&why))
        });
        self.usable(read.collect())
    }

    /// The next records, for the first of which it waits: an empty list at the end of what is
    /// there, and none where the engine has failed or no record can be used, which says nothing
    /// about what is there.
    ///
    /// # Errors
    /// An engine that has failed for long.
    pub(super) fn next(
        &mut self,
        most: usize,
        wait: Duration,
    ) -> Result<Option<Vec<PositionedExample>>> {
        let records = match self.reader.next(most, wait) {
            Ok(records) => records,
            Err(error) => {
                self.retry(error.into())?;
                return Ok(None);
            }
        };
        self.failures = 0;
        let at_end = records.is_empty();
        let read = records.into_iter().map(|StreamRecord { position, payload, .. }| {
            let key = RecordKey { position, retries: 0 };
            self.decode(key, &payload).map_err(|why| key.unreadable(&why))
        });
        let usable = self.usable(read.collect())?;
        Ok((at_end || !usable.is_empty()).then_some(usable))
    }

    fn decode(&self, key: RecordKey, payload: &[u8]) -> Result<PositionedExample> {
        let (correction, JoinedExample { example, ingested_ms }) =
            match JoinedRecord::decode(payload)? {
                JoinedRecord::Example(joined) => (false, joined),
                JoinedRecord::Correction(joined) => (true, joined),
            };
        let example = self.restored(example);
        self.fits.check(&example)?;
        Ok(PositionedExample { example, correction, ingested_ms, key })
    }

    /// Sets the others aside.
    fn usable(
        &self,
        read: Vec<std::result::Result<PositionedExample, UnusableRecord>>,
    ) -> Result<Vec<PositionedExample>> {
        let (mut usable, mut unusable) = (Vec::with_capacity(read.len()), Vec::new());
        for record in read {
            match record {
                Ok(record) => usable.push(record),
                Err(record) => unusable.push(record),
            }
        }
        self.set_aside(unusable)?;
        Ok(usable)
    }

    fn retry(&mut self, error: Error) -> Result<()> {
        self.failures += 1;
        if self.failures >= MOST_FAILURES {
            return Err(error);
        }
        tracing::warn!(%error, "the joined stream cannot be read; trying again");
        std::thread::sleep(RETRY_AFTER);
        if let Ok(reader) = self.engine.reader(&Topic::joined(), self.reader.position()) {
            self.reader = reader;
        }
        Ok(())
    }

    fn restored(&self, mut example: Example) -> Example {
        let clipped = self.ranges.clip(&mut example);
        if clipped > 0 {
            tracing::debug!(request = example.request, clipped, "numbers were beyond their ranges");
        }
        if self.content.is_empty() {
            return example;
        }
        let restore = |item: &mut Arc<Item>| {
            if let Some(content) = self.content.get(&item.id) {
                Arc::make_mut(item).content = content.clone();
            }
        };
        example.history.iter_mut().for_each(|event: &mut Event| restore(&mut event.item));
        example.targets.iter_mut().for_each(|target| restore(&mut target.item));
        example
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use hypercast_config::Config;
    use hypercast_data::dataset::{Dataset, timeline::Span};
    use hypercast_data::features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    };
    use hypercast_data::import::simulate::{SimulateOptions, simulate};
    use hypercast_stream::dead_letters;
    use hypercast_stream::streams::{Appender, MemoryEngine, Record as Told, StreamRecord};

    /// An engine whose first reader fails once.
    #[derive(Default)]
    struct Failing(MemoryEngine, std::sync::atomic::AtomicBool);

    struct FailingReader(Option<hypercast_stream::Error>, Box<dyn Reader>);

    impl StreamEngine for Failing {
        fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
            self.0.appender(topic)
        }

        fn reader(&self, topic: &Topic, from: u64) -> hypercast_stream::Result<Box<dyn Reader>> {
            let first = *topic == Topic::joined()
                && !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
            let error = first.then(|| hypercast_stream::Error::unreachable("gone for a moment"));
            Ok(Box::new(FailingReader(error, self.0.reader(topic, from)?)))
        }

        fn span(&self, topic: &Topic) -> hypercast_stream::Result<Range<u64>> {
            self.0.span(topic)
        }

        fn trim(&self, topic: &Topic, before: u64) -> hypercast_stream::Result<()> {
            self.0.trim(topic, before)
        }
    }

    impl Reader for FailingReader {
        fn next(
            &mut self,
            most: usize,
            wait: Duration,
        ) -> hypercast_stream::Result<Vec<StreamRecord>> {
            match self.0.take() {
                Some(error) => Err(error),
                None => self.1.next(most, wait),
            }
        }

        fn position(&self) -> u64 {
            self.1.position()
        }
    }

    #[test]
    fn neither_an_engine_that_fails_nor_a_record_without_use_ends_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let world = hypercast_data::import::simulate::SimulateOptions {
            into: dir.path().join("data"),
            users: 5,
            items: 20,
            requests: 20,
            surfaces: 1,
            seed: 1,
        };
        hypercast_data::import::simulate::simulate(&world).unwrap();
        let dataset = Dataset::open(&world.into).unwrap();
        let engine = Arc::new(Failing::default());
        let example = Example {
            request: 1,
            user: Arc::default(),
            surface: 0,
            time_ms: 1,
            history: Vec::new(),
            targets: Vec::new(),
        };
        let payload = |surface: u16| {
            let example = Example { surface, ..example.clone() };
            let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1 });
            postcard::to_stdvec(&joined).unwrap()
        };
        let appender = engine.appender(&Topic::joined()).unwrap();
        let append = |payload| appender.append(&[Told { id: 0, payload }]).unwrap();
        append(payload(0));
        let config = Config::default();
        let context = ServiceContext { dataset: &dataset, config: &config, engine: engine.clone() };
        let open = |position| {
            let of = LetterReader::Logging;
            JoinedReader::open(context.clone(), &of, position, Arc::default()).unwrap()
        };
        let mut reader = open(JoinedPosition::default());
        let mut next = || reader.next(8, Duration::ZERO).unwrap().map(|records| records.len());
        assert_eq!([next(), next(), next()], [None, Some(1), Some(0)]);

        // Records that cannot be used are no end either, and no reader stops at them.
        append(vec![0xff; 9]);
        append(payload(3));
        assert_eq!([next(), next()], [None, Some(0)]);
        append(vec![]);
        append(payload(0));
        assert_eq!([next(), next()], [Some(1), Some(0)]);
        let mut again = open(JoinedPosition { joined: Some(0), orders: None });
        let records = again.next(8, Duration::ZERO).unwrap().unwrap();
        let positions: Vec<u64> = records.iter().map(|record| record.key.position).collect();
        assert_eq!(positions, [0, 4]);
        let letters = dead_letters::list(&*engine).unwrap();
        let positions: Vec<u64> = letters.iter().map(|own| own.letter.position).collect();
        assert_eq!(positions, [1, 2, 3], "each once, although they were read twice");
        assert!(letters[1].letter.reason.contains("its surface has index 3"), "{letters:?}");
    }

    #[test]
    fn numbers_of_another_release_are_clipped_to_the_ranges_of_the_schema() {
        let dir = tempfile::tempdir().unwrap();
        let into = dir.path().join("data");
        let world =
            SimulateOptions { into, users: 5, items: 20, requests: 20, surfaces: 1, seed: 1 };
        simulate(&world).unwrap();
        let dataset = Dataset::open(&world.into).unwrap();
        let replay = ReplayOptions {
            span: Span::default(),
            history_len: 4,
            max_targets: 8,
            features: FeatureConfig::default(),
        };
        let mut example = Replay::new(&dataset, replay).unwrap().next().unwrap().unwrap();
        example.targets[0].outcome.values[0] = 1e15;
        let joined = JoinedRecord::Correction(JoinedExample { example, ingested_ms: 1 });
        let engine = Arc::new(MemoryEngine::default());
        let payload = postcard::to_stdvec(&joined).unwrap();
        let appender = engine.appender(&Topic::joined()).unwrap();
        appender.append(&[Told { id: 0, payload }]).unwrap();
        let config = Config::default();
        let context = ServiceContext { dataset: &dataset, config: &config, engine };
        let position = JoinedPosition::default();
        let of = LetterReader::Logging;
        let mut reader = JoinedReader::open(context, &of, position, Arc::default()).unwrap();
        let read = reader.next(1, Duration::ZERO).unwrap().unwrap();
        assert_eq!(read[0].example.targets[0].outcome.values[0], 1.0);
    }
}
