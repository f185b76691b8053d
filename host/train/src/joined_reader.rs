//! The stream of joined examples as its followers read it: decoded, with the content vectors of the
//! data set put back, and clipped to the ranges of its schema, because another release may have
//! written the stream. An engine that fails is asked again for a while, and its failing is no end.

use std::{collections::HashMap, sync::Arc, time::Duration};

use hypercast_fm::example::{Event, Example, Item};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::Dataset;
use hypercast_data::schema::ColumnRanges;
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::streams::{Reader, StreamEngine, Topic};

/// How long it waits after an engine has failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row after which it gives up.
const MOST_FAILURES: u32 = 120;

/// An example or a correction, with its position.
pub(super) struct PositionedExample {
    pub(super) example: Example,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
    /// The position after it.
    pub(super) end: u64,
}

/// Follows the stream `joined`, and waits out an engine that fails for a while.
pub(super) struct JoinedReader {
    engine: Arc<dyn StreamEngine>,
    reader: Box<dyn Reader>,
    content: HashMap<u64, Arc<[f32]>>,
    ranges: ColumnRanges,
    failures: u32,
}

impl JoinedReader {
    /// From a position on, or from the first record that is kept.
    ///
    /// # Errors
    /// A stream that ends before the position, or no longer has it.
    pub(super) fn open(
        engine: Arc<dyn StreamEngine>,
        dataset: &Dataset,
        from: Option<u64>,
    ) -> Result<JoinedReader> {
        let topic = Topic::joined();
        let span = engine.span(&topic)?;
        let from = from.unwrap_or(span.start);
        if from < span.start || from > span.end {
            return Err(Error::invalid(format!(
                "stream {topic} holds positions {} to {}, and {from} is where to go on; what was written so far is of another stream, or records are gone: begin in another folder",
                span.start, span.end
            )));
        }
        let with = dataset.items.values().filter(|item| !item.content.is_empty());
        let content = with.map(|item| (item.id, item.content.clone())).collect();
        let reader = engine.reader(&topic, from)?;
        let ranges = ColumnRanges::new(&dataset.schema);
        Ok(JoinedReader { engine, reader, content, ranges, failures: 0 })
    }

    /// The position of the next record.
    pub(super) fn position(&self) -> u64 {
        self.reader.position()
    }

    /// The next records, for the first of which it waits: an empty list at the end of what is
    /// there, and none where the engine has failed, which says nothing about what is there.
    ///
    /// # Errors
    /// A record of another version, or an engine that has failed for long.
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
        let read = |record: hypercast_stream::streams::StreamRecord| {
            let joined = JoinedRecord::decode(&record.payload).map_err(|error| {
                let at = record.position;
                Error::invalid(format!("position {at}: {error}; another version wrote it"))
            })?;
            let (correction, JoinedExample { example, ingested_ms }) = match joined {
                JoinedRecord::Example(joined) => (false, joined),
                JoinedRecord::Correction(joined) => (true, joined),
            };
            let example = self.restored(example);
            Ok(PositionedExample { example, correction, ingested_ms, end: record.position + 1 })
        };
        records.into_iter().map(read).collect::<Result<_>>().map(Some)
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
    use hypercast_data::dataset::timeline::Span;
    use hypercast_data::features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    };
    use hypercast_data::import::simulate::{SimulateOptions, simulate};
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
            let first = !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
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
    fn an_engine_that_fails_is_no_end_of_the_stream() {
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
        let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1 });
        let payload = postcard::to_stdvec(&joined).unwrap();
        let appender = engine.appender(&Topic::joined()).unwrap();
        appender.append(&[Told { id: 0, payload }]).unwrap();
        let mut reader = JoinedReader::open(engine, &dataset, None).unwrap();
        let mut next = || reader.next(8, Duration::ZERO).unwrap().map(|records| records.len());
        assert_eq!([next(), next(), next()], [None, Some(1), Some(0)]);
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
        let mut reader = JoinedReader::open(engine, &dataset, None).unwrap();
        let read = reader.next(1, Duration::ZERO).unwrap().unwrap();
        assert_eq!(read[0].example.targets[0].outcome.values[0], 1.0);
    }
}
