//! The stream of joined examples as its followers read it: decoded, with the content vectors of the
//! data set put back. An engine that fails is asked again for a while, and its failing is no end.

use std::{collections::HashMap, sync::Arc, time::Duration};

use hypercast_fm::example::{Event, Example, Item};

use crate::error::{CommonErrors as _, Error, Result};
use hypercast_data::dataset::Dataset;
use hypercast_stream::join::{JoinedExample, JoinedRecord};
use hypercast_stream::streams::{GapHandling, StreamEngine, StreamFollower, StreamPlace, Topic};

/// How long it waits after an engine has failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Failures in a row after which it gives up.
const MOST_FAILURES: u32 = 120;

/// An example or a correction, with its position.
pub(super) struct PositionedExample {
    pub(super) example: Example,
    pub(super) correction: bool,
    pub(super) ingested_ms: i64,
    /// The place after it.
    pub(super) end: StreamPlace,
}

/// Follows the stream `joined`, and waits out an engine that fails for a while.
pub(super) struct JoinedReader {
    stream: StreamFollower,
    content: HashMap<u64, Arc<[f32]>>,
    failures: u32,
}

impl JoinedReader {
    /// From a place on, or from the first record that is kept.
    ///
    /// # Errors
    /// The engine cannot be reached.
    pub(super) fn open(
        engine: Arc<dyn StreamEngine>,
        dataset: &Dataset,
        from: Option<StreamPlace>,
        gaps: GapHandling,
    ) -> Result<JoinedReader> {
        let with = dataset.items.values().filter(|item| !item.content.is_empty());
        let content = with.map(|item| (item.id, item.content.clone())).collect();
        let stream = StreamFollower::open(engine, Topic::joined(), from, gaps)?;
        Ok(JoinedReader { stream, content, failures: 0 })
    }

    /// The place of the next record.
    pub(super) fn place(&self) -> StreamPlace {
        self.stream.place()
    }

    /// The next records, for the first of which it waits: an empty list at the end of what is
    /// there, and none where the engine has failed, which says nothing about what is there.
    ///
    /// # Errors
    /// A record of another version, records that are missing, or an engine that has failed for
    /// long.
    pub(super) fn next(
        &mut self,
        most: usize,
        wait: Duration,
    ) -> Result<Option<Vec<PositionedExample>>> {
        let before = self.place();
        let records = match self.stream.next(most, wait) {
            // Behind missing records there may be more.
            Ok(records) if records.is_empty() && self.place() != before => return Ok(None),
            Ok(records) => records,
            Err(error @ hypercast_stream::Error::Gap(_)) => return Err(error.into()),
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
            let end = StreamPlace::after(&record);
            Ok(PositionedExample { example, correction, ingested_ms, end })
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
        Ok(())
    }

    fn restored(&self, mut example: Example) -> Example {
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
    use crate::job_metrics::JobMetrics;
    use hypercast_config::OnGap;
    use hypercast_stream::streams::{Appender, MemoryEngine, Reader, Record as Told, StreamRecord};

    /// An engine whose first reader fails once.
    #[derive(Default)]
    struct Failing(MemoryEngine, std::sync::atomic::AtomicBool);

    struct FailingReader(Option<hypercast_stream::Error>, Box<dyn Reader>);

    impl StreamEngine for Failing {
        fn appender(&self, topic: &Topic) -> hypercast_stream::Result<Arc<dyn Appender>> {
            self.0.appender(topic)
        }

        fn resume(
            &self,
            topic: &Topic,
            place: StreamPlace,
        ) -> hypercast_stream::Result<Box<dyn Reader>> {
            let first = !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
            let error = first.then(|| hypercast_stream::Error::unreachable("gone for a moment"));
            Ok(Box::new(FailingReader(error, self.0.resume(topic, place)?)))
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

    fn dataset(dir: &std::path::Path) -> Dataset {
        let world = hypercast_data::import::simulate::SimulateOptions {
            into: dir.join("data"),
            users: 5,
            items: 20,
            requests: 20,
            surfaces: 1,
            seed: 1,
        };
        hypercast_data::import::simulate::simulate(&world).unwrap();
        Dataset::open(&world.into).unwrap()
    }

    /// Appends an example for each request.
    fn append(engine: &dyn StreamEngine, requests: std::ops::Range<u64>) {
        let record = |request| {
            let example = Example {
                request,
                user: Arc::default(),
                surface: 0,
                time_ms: 1,
                history: Vec::new(),
                targets: Vec::new(),
            };
            let joined = JoinedRecord::Example(JoinedExample { example, ingested_ms: 1 });
            Told { id: 0, payload: postcard::to_stdvec(&joined).unwrap() }
        };
        let records: Vec<Told> = requests.map(record).collect();
        engine.appender(&Topic::joined()).unwrap().append(&records).unwrap();
    }

    fn open(
        engine: Arc<dyn StreamEngine>,
        from: Option<StreamPlace>,
        gaps: GapHandling,
    ) -> JoinedReader {
        let dir = tempfile::tempdir().unwrap();
        JoinedReader::open(engine, &dataset(dir.path()), from, gaps).unwrap()
    }

    #[test]
    fn an_engine_that_fails_is_no_end_of_the_stream() {
        let engine = Arc::new(Failing::default());
        append(&*engine, 1..2);
        let mut reader = open(engine, None, JobMetrics::default().gaps(OnGap::Stop));
        let mut next = || reader.next(8, Duration::ZERO).unwrap().map(|records| records.len());
        assert_eq!([next(), next(), next()], [None, Some(1), Some(0)]);
    }

    #[test]
    fn a_stream_that_was_made_anew_stops_a_trainer_or_is_read_from_its_beginning() {
        let engine = Arc::new(MemoryEngine::default());
        append(&*engine, 1..6);
        let metrics = JobMetrics::default();
        let mut reader = open(engine, None, metrics.gaps(OnGap::Stop));
        let read = reader.next(3, Duration::ZERO).unwrap().unwrap();
        let place = read[1].end;
        assert!(place.position == 2 && reader.place() == read[2].end);
        let anew = Arc::new(MemoryEngine::default());
        append(&*anew, 11..16);
        for policy in [OnGap::Stop, OnGap::Continue] {
            let metrics = JobMetrics::default();
            let mut reader = open(anew.clone(), Some(place), metrics.gaps(policy));
            let first = reader.next(8, Duration::ZERO);
            let counted = metrics.render();
            assert!(counted.contains("stream_gaps_total{stream=\"joined\"} 1"), "{counted}");
            if policy == OnGap::Stop {
                let error = first.err().unwrap().to_string();
                assert!(error.contains("made anew") && error.contains("on_gap"), "{error}");
                continue;
            }
            assert!(first.unwrap().is_none(), "there may be more");
            let read = reader.next(8, Duration::ZERO).unwrap().unwrap();
            let requests: Vec<u64> = read.iter().map(|record| record.example.request).collect();
            assert_eq!(requests, [11, 12, 13, 14, 15]);
        }
    }
}
