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

    /// The same that shows examples as the foundation model is shown them.
    pub(super) fn of_core(self, schema: &Schema) -> JoinedReader {
        JoinedReader { shown: Some(CoreColumns::new(schema)), ..self }
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
mod tests {
    use std::ops::Range;

    use super::*;
    use hypercast_config::OnGap;
    use hypercast_core::error::CommonErrors as _;
    use hypercast_data::dataset::{Dataset, timeline::Span};
    use hypercast_data::features::{
        FeatureConfig,
        replay::{Replay, ReplayOptions},
    };
    use hypercast_data::schema::OwnedEntries;
    use hypercast_data::simulate::{SimulateOptions, simulate};
    use hypercast_stream::dead_letters;
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
            let first = *topic == Topic::joined()
                && !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
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

    fn world(dir: &std::path::Path) -> Dataset {
        let into = dir.join("data");
        let world =
            SimulateOptions { into, users: 5, items: 20, requests: 20, surfaces: 1, seed: 1 };
        simulate(&world).unwrap();
        Dataset::open(&world.into).unwrap()
    }

    fn payload(request: u64, surface: u16) -> Vec<u8> {
        let example = Example {
            request,
            user: Arc::default(),
            surface,
            time_ms: 1,
            history: Vec::new(),
            targets: Vec::new(),
        };
        let joined = JoinedExample { example, ingested_ms: 1, ranked: Vec::new() };
        let joined = JoinedRecord::Example(joined);
        postcard::to_stdvec(&joined).unwrap()
    }

    fn append(engine: &dyn StreamEngine, payloads: impl IntoIterator<Item = Vec<u8>>) {
        let records: Vec<Told> =
            payloads.into_iter().map(|payload| Told { id: 0, payload }).collect();
        engine.appender(&Topic::joined()).unwrap().append(&records).unwrap();
    }

    /// A reader from a place on, that does with gaps as `policy` says, and its metrics.
    fn open(
        engine: Arc<dyn StreamEngine>,
        dataset: &Dataset,
        joined: Option<StreamTrail>,
        policy: OnGap,
    ) -> (JoinedReader, JobMetrics) {
        let (mut config, metrics) = (Config::default(), JobMetrics::default());
        config.engine.on_gap = policy;
        let reports = RecordReports::of(&metrics, &config, &Shutdown::default());
        let context = ServiceContext { dataset, config: &config, engine };
        let position = JoinedPosition { joined, orders: None };
        let of = LetterReader::Logging;
        (JoinedReader::open(context, &of, position, reports).unwrap(), metrics)
    }

    fn records(read: JoinedRead) -> Vec<PositionedExample> {
        match read {
            JoinedRead::Records(records) => records,
            other => panic!("records, not {}", said(&other)),
        }
    }

    fn said(read: &JoinedRead) -> String {
        match read {
            JoinedRead::Records(records) => format!("{} records", records.len()),
            JoinedRead::Later => "later".to_owned(),
            JoinedRead::End => "end".to_owned(),
            JoinedRead::Gap(gap) => format!("{gap:?}"),
            JoinedRead::Stopped => "stopped".to_owned(),
        }
    }

    #[test]
    fn neither_an_engine_that_fails_nor_a_record_without_use_ends_the_stream() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = world(dir.path());
        let engine = Arc::new(Failing::default());
        append(&*engine, [payload(1, 0)]);
        let (mut reader, _) = open(engine.clone(), &dataset, None, OnGap::Stop);
        let mut next = || said(&reader.next(8, Duration::ZERO).unwrap());
        assert_eq!([next(), next(), next()], ["later", "1 records", "end"]);

        // Records that cannot be used are no end either, and no reader stops at them.
        append(&*engine, [vec![0xff; 9], payload(1, 3)]);
        assert_eq!([next(), next()], ["later", "end"]);
        append(&*engine, [vec![], payload(1, 0)]);
        assert_eq!([next(), next()], ["1 records", "end"]);
        let (mut again, _) =
            open(engine.clone(), &dataset, Some(StreamPlace::at(0).into()), OnGap::Stop);
        let records = records(again.next(8, Duration::ZERO).unwrap());
        let positions: Vec<u64> = records.iter().map(|record| record.key.position).collect();
        assert_eq!(positions, [0, 4]);
        let letters = dead_letters::list(&*engine).unwrap().letters;
        let positions: Vec<u64> = letters.iter().map(|own| own.letter.position).collect();
        assert_eq!(positions, [1, 2, 3], "each once, although they were read twice");
        assert!(letters[1].letter.reason.contains("its surface has index 3"), "{letters:?}");
    }

    #[test]
    fn what_is_read_while_a_stop_comes_is_left_to_whoever_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = world(dir.path());
        let engine = Arc::new(MemoryEngine::default());
        append(&*engine, [payload(1, 0)]);
        let (config, metrics) = (Config::default(), JobMetrics::default());
        // As where the schema grows after the look before the read.
        let looks = std::sync::atomic::AtomicU32::new(0);
        let stop = Shutdown::default()
            .part(move || looks.fetch_add(1, std::sync::atomic::Ordering::Relaxed) > 0);
        assert!(!stop.is_requested());
        let reports = RecordReports::of(&metrics, &config, &stop);
        let context = ServiceContext { dataset: &dataset, config: &config, engine: engine.clone() };
        // Of a surface that this schema lacks.
        append(&*engine, [payload(2, 3)]);
        let mut reader =
            JoinedReader::open(context, &LetterReader::Logging, JoinedPosition::default(), reports)
                .unwrap();
        assert_eq!(said(&reader.next(8, Duration::ZERO).unwrap()), "stopped");
        assert!(dead_letters::list(&*engine).unwrap().letters.is_empty());
    }

    #[test]
    fn numbers_of_another_release_are_clipped_to_the_ranges_of_the_schema() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = world(dir.path());
        let replay = ReplayOptions {
            span: Span::default(),
            history_len: 4,
            max_targets: 8,
            features: FeatureConfig::default(),
        };
        let mut example = Replay::new(&dataset, replay).unwrap().next().unwrap().unwrap();
        example.targets[0].outcome.values[0] = 1e15;
        let joined = JoinedExample { example, ingested_ms: 1, ranked: Vec::new() };
        let joined = JoinedRecord::Correction(joined);
        let engine = Arc::new(MemoryEngine::default());
        append(&*engine, [postcard::to_stdvec(&joined).unwrap()]);
        let (mut reader, _) = open(engine, &dataset, None, OnGap::Stop);
        let read = records(reader.next(1, Duration::ZERO).unwrap());
        assert_eq!(read[0].example.targets[0].outcome.values[0], 1.0);
    }

    #[test]
    fn a_correction_of_what_belongs_to_a_surface_is_not_shown_to_the_fm() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = world(dir.path());
        let replay = ReplayOptions {
            span: Span::default(),
            history_len: 4,
            max_targets: 8,
            features: FeatureConfig::default(),
        };
        let example = Replay::new(&dataset, replay).unwrap().next().unwrap().unwrap();
        let correction = |known: u64| {
            let outcome = Outcome { actions: known, known, ..Outcome::UNKNOWN };
            let mut example = example.clone();
            example.targets.iter_mut().for_each(|target| target.outcome = outcome);
            let joined = JoinedExample { example, ingested_ms: 1, ranked: Vec::new() };
            postcard::to_stdvec(&JoinedRecord::Correction(joined)).unwrap()
        };
        let engine = Arc::new(MemoryEngine::default());
        append(&*engine, [0b100, 0b101, 0b100].map(correction));
        let mut schema = Schema::clone(&dataset.schema);
        let actions = [schema.actions[2].clone()].into();
        let own = OwnedEntries { actions, ..OwnedEntries::default() };
        schema.owned.insert(schema.surfaces[0].clone(), own);
        let (reader, _) = open(engine, &dataset, None, OnGap::Stop);
        let mut reader = reader.of_core(&schema);
        let read = records(reader.next(8, Duration::ZERO).unwrap());
        let known: Vec<u64> =
            read.iter().map(|record| record.example.targets[0].outcome.known).collect();
        assert_eq!((known, reader.place().position), (vec![0b001], 3));
    }

    #[test]
    fn a_stream_that_was_made_anew_stops_a_trainer_or_is_read_from_its_beginning() {
        let dir = tempfile::tempdir().unwrap();
        let dataset = world(dir.path());
        let engine = Arc::new(MemoryEngine::default());
        append(&*engine, (1..6).map(|request| payload(request, 0)));
        let (mut reader, _) = open(engine, &dataset, None, OnGap::Stop);
        let read = records(reader.next(3, Duration::ZERO).unwrap());
        let place = read[1].end;
        assert!(place.position == 2 && reader.place() == read[2].end);
        let anew = Arc::new(MemoryEngine::default());
        append(&*anew, (11..16).map(|request| payload(request, 0)));
        for policy in [OnGap::Stop, OnGap::Continue] {
            let (mut reader, metrics) = open(anew.clone(), &dataset, Some(place.into()), policy);
            let first = reader.next(8, Duration::ZERO);
            let counted = metrics.render();
            assert!(counted.contains("stream_gaps_total{stream=\"joined\"} 1"), "{counted}");
            if policy == OnGap::Stop {
                let error = first.err().unwrap().to_string();
                assert!(error.contains("made anew") && error.contains("on_gap"), "{error}");
                continue;
            }
            let gap = PassedGap { to: StreamPlace::at(0), is_back: true };
            assert!(matches!(first.unwrap(), JoinedRead::Gap(first) if first == gap));
            // It waits until its caller has saved that.
            let again = reader.next(8, Duration::ZERO).unwrap();
            assert!(matches!(again, JoinedRead::Gap(again) if again == gap));
            assert_eq!(counted, metrics.render(), "counted once");
            reader.go_on();
            let read = records(reader.next(8, Duration::ZERO).unwrap());
            let requests: Vec<u64> = read.iter().map(|record| record.example.request).collect();
            assert_eq!(requests, [11, 12, 13, 14, 15]);
        }
    }
}
