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
        let first =
            *topic == Topic::joined() && !self.1.swap(true, std::sync::atomic::Ordering::Relaxed);
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
    fn next(&mut self, most: usize, wait: Duration) -> hypercast_stream::Result<Vec<StreamRecord>> {
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
    let world = SimulateOptions { into, users: 5, items: 20, requests: 20, surfaces: 1, seed: 1 };
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
    let records: Vec<Told> = payloads.into_iter().map(|payload| Told { id: 0, payload }).collect();
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

fn first_example(dataset: &Dataset) -> Example {
    let replay = ReplayOptions {
        span: Span::default(),
        history_len: 4,
        max_targets: 8,
        features: FeatureConfig::default(),
    };
    Replay::new(dataset, replay).unwrap().next().unwrap().unwrap()
}

#[test]
fn numbers_of_another_release_are_clipped_to_the_ranges_of_the_schema() {
    let dir = tempfile::tempdir().unwrap();
    let dataset = world(dir.path());
    let mut example = first_example(&dataset);
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
    let example = first_example(&dataset);
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
