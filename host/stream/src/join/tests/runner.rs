//! The runner: killed at any moment, between any two records of its streams, it continues so that
//! each record is there once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use hypercast_config::{Config, OnGap};
use hypercast_core::shutdown::Shutdown;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::world::*;
use crate::dead_letters::{self, SetAsideRate};
use crate::error::{CommonErrors as _, Error, Result};
use crate::events::{EventRecord, NewEvent};
use crate::join::rehearsal::Rehearsal;
use crate::join::{JoinMetrics, JoinedRecord, JoinerOutput, JoinerProgress, OutcomeRecord, Runner};
use crate::streams::tests::holes::holed;
use crate::streams::{
    Appended, Appender, MemoryEngine, Reader, Record, StreamEngine, StreamPlace, StreamRecord,
    Topic,
};

pub(super) struct NoMetrics;

impl JoinMetrics for NoMetrics {
    fn event_latency(&self, _: &str, _: i64) {}

    fn joiner(&self, _: JoinerProgress) {}

    fn set_aside_rate(&self) -> Arc<SetAsideRate> {
        Arc::default()
    }

    fn stream_gap(&self, _: &Topic) {}
}

/// Counts the gaps in the stream of events, which is the only one that this test cuts.
#[derive(Default)]
struct GapCount(AtomicI64);

impl JoinMetrics for GapCount {
    fn event_latency(&self, _: &str, _: i64) {}

    fn joiner(&self, _: JoinerProgress) {}

    fn set_aside_rate(&self) -> Arc<SetAsideRate> {
        Arc::default()
    }

    fn stream_gap(&self, topic: &Topic) {
        assert_eq!(*topic, Topic::events());
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Streams whose appends at an expected end fail after a number of records, as when the process is
/// killed.
struct Failing {
    streams: Arc<MemoryEngine>,
    left: Arc<AtomicI64>,
    /// What another joiner stores just then.
    others: &'static [Record],
}

struct FailingAppender {
    to: Arc<dyn Appender>,
    left: Arc<AtomicI64>,
    others: &'static [Record],
}

impl StreamEngine for Failing {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        let to = self.streams.appender(topic)?;
        Ok(Arc::new(FailingAppender { to, left: self.left.clone(), others: self.others }))
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        self.streams.resume(topic, place)
    }

    fn span(&self, topic: &Topic) -> Result<std::ops::Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Appender for FailingAppender {
    fn submit(&self, expected_end: Option<u64>, records: &[Record]) -> Result<Option<Appended>> {
        if expected_end.is_none() {
            return self.to.submit(None, records);
        }
        let left = self.left.fetch_sub(records.len() as i64, Ordering::Relaxed).max(0) as usize;
        if left >= records.len() {
            return self.to.submit(expected_end, records);
        }
        // A part of the batch is stored, but the caller gets an error.
        self.to.submit(expected_end, &records[..left])?;
        self.to.submit(None, self.others)?;
        Err(Error::unreachable("killed"))
    }
}

/// What another joiner stores.
const OTHERS: &[Record] = &[Record { id: 0, payload: Vec::new() }];

/// Streams whose server stored everything at one time.
struct Stamped {
    streams: Arc<MemoryEngine>,
    stored_ms: i64,
}

struct StampedReader {
    from: Box<dyn Reader>,
    stored_ms: i64,
}

impl StreamEngine for Stamped {
    fn appender(&self, topic: &Topic) -> Result<Arc<dyn Appender>> {
        self.streams.appender(topic)
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        let from = self.streams.resume(topic, place)?;
        Ok(Box::new(StampedReader { from, stored_ms: self.stored_ms }))
    }

    fn span(&self, topic: &Topic) -> Result<std::ops::Range<u64>> {
        self.streams.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.streams.trim(topic, before)
    }
}

impl Reader for StampedReader {
    fn next(&mut self, most: usize, wait: Duration) -> Result<Vec<StreamRecord>> {
        let stored_ms = Some(self.stored_ms);
        let stored = self.from.next(most, wait)?;
        Ok(stored.into_iter().map(|record| StreamRecord { stored_ms, ..record }).collect())
    }

    fn position(&self) -> u64 {
        self.from.position()
    }
}

pub(super) fn config(dir: &std::path::Path) -> Config {
    let mut config = Config { join: settings(), ..Config::default() };
    config.paths.state = dir.join("state");
    (config.fm.max_history, config.fm.max_targets) = (8, 4);
    config.join.save_every_events = 64;
    config
}

pub(super) fn append_events(streams: &MemoryEngine, events: &[EventRecord]) {
    let record = |event: &EventRecord| {
        let new = NewEvent { id: None, kind: event.kind.clone() };
        Record { id: 0, ..new.record(event.ingested_ms).unwrap() }
    };
    let records: Vec<Record> = events.iter().map(record).collect();
    streams.appender(&Topic::events()).unwrap().append(&records).unwrap();
}

/// Everything in the joiner's streams.
fn streams(memory: &MemoryEngine) -> (Vec<String>, Vec<String>) {
    let read = |topic: &Topic| {
        let end = memory.span(topic).unwrap().end as usize;
        let mut reader = memory.reader(topic, 0).unwrap();
        let mut payloads = Vec::new();
        while payloads.len() < end {
            let stored = reader.next(1 << 20, Duration::ZERO).unwrap();
            payloads.extend(stored.into_iter().map(|record| record.payload));
        }
        payloads
    };
    let joined = read(&Topic::joined());
    let outcomes = read(&Topic::outcomes());
    (
        joined
            .iter()
            .map(|payload| format!("{:?}", JoinedRecord::decode(payload).unwrap()))
            .collect(),
        outcomes
            .iter()
            .map(|payload| format!("{:?}", OutcomeRecord::decode(payload).unwrap()))
            .collect(),
    )
}

#[test]
fn a_joiner_that_is_killed_makes_each_record_once() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    for seed in 0..10 {
        let events = random(seed, 150);
        let expected = texts(&all(&mut joiner(&data, settings()), &events));
        let config = config(&dir.path().join(seed.to_string()));
        let memory = Arc::new(MemoryEngine::default());
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut from, mut kills) = (0, 0);
        while from < events.len() || streams(&memory) != expected {
            let until = (from + rng.random_range(0..200)).min(events.len());
            append_events(&memory, &events[from..until]);
            from = until;
            let left = Arc::new(AtomicI64::new(rng.random_range(0..150)));
            let is_killed = left.clone();
            let engine = Arc::new(Failing { streams: memory.clone(), left, others: &[] });
            // Then it does not wait for an engine that is not coming back.
            let stop = Shutdown::default().part(move || is_killed.load(Ordering::Relaxed) < 0);
            let (settings, metrics) = (config.joiner().unwrap(), Arc::new(NoMetrics));
            let mut runner = Runner::open(engine, &settings, &data, metrics, stop.clone()).unwrap();
            let end = memory.span(&Topic::events()).unwrap().end;
            while runner.passed().events < end {
                if runner.step(Duration::ZERO).is_err() {
                    kills += 1;
                    break;
                }
            }
            if rng.random_bool(0.2) && runner.passed().events == end {
                stop.request();
                runner.run(|_| {}).unwrap();
            }
        }
        assert!(kills > 2, "seed {seed}: {kills} kills");
    }
}

#[test]
fn records_of_another_joiner_are_not_taken_for_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &random(3, 150));
    let left = Arc::default();
    let engine = Arc::new(Failing { streams: memory.clone(), left, others: OTHERS });
    let (settings, stop) = (config(dir.path()).joiner().unwrap(), Shutdown::default());
    let mut runner = Runner::open(engine, &settings, &data, Arc::new(NoMetrics), stop).unwrap();
    let error = loop {
        if let Err(error) = runner.step(Duration::ZERO) {
            break error.to_string();
        }
    };
    assert!(error.contains("another joiner writes"), "{error}");
    assert_eq!(memory.span(&Topic::outcomes()).unwrap(), 0..1, "nothing of its own is behind");
}

#[test]
fn a_state_without_its_streams_is_refused_and_so_is_another_writer() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let config = config(dir.path());
    let memory = Arc::new(MemoryEngine::default());
    let open = |streams: &Arc<MemoryEngine>, config: &Config| {
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        Runner::open(streams.clone(), &config.joiner().unwrap(), &data, metrics, stop)
    };
    append_events(&memory, &random(1, 40));
    let mut runner = open(&memory, &config).unwrap();
    let held = open(&memory, &config).err().unwrap().to_string();
    assert!(held.contains(&format!("process {}", std::process::id())), "{held}");
    while runner.step(Duration::ZERO).unwrap() > 0 {}
    runner.save().unwrap();
    memory
        .appender(&Topic::joined())
        .unwrap()
        .append(&[Record { id: 0, payload: vec![0] }])
        .unwrap();
    append_events(&memory, &[shown(1000, 1, 0, (1 << 52) + 1), tick(1 << 53)]);
    let error = runner.step(Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("another joiner writes"), "{error}");
    drop(runner);
    let lost = open(&Arc::new(MemoryEngine::default()), &config).err().unwrap().to_string();
    assert!(lost.contains("restore"), "{lost}");
    let mut other = config.clone();
    other.timeline.until = "2022-01-01".into();
    let error = open(&memory, &other).err().unwrap().to_string();
    assert!(
        error.contains("another data set") && error.contains("move the folder away"),
        "{error}"
    );
}

#[test]
fn settings_change_only_after_the_records_of_the_old_ones_are_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let events = random(5, 150);
    let expected = texts(&all(&mut joiner(&data, settings()), &events));
    let mut config = config(dir.path());
    // Only the first state is saved.
    config.join.save_every_events = 1 << 40;
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &events);
    for windows in [60, 2] {
        config.join.first_window_s = windows;
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        let mut runner =
            Runner::open(memory.clone(), &config.joiner().unwrap(), &data, metrics, stop).unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(streams(&memory), expected, "each written once, with the first settings");
    }
}

#[test]
fn an_event_that_cannot_be_used_is_set_aside_and_the_rest_is_joined() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let config = config(dir.path());
    let memory = Arc::new(MemoryEngine::default());
    let events = random(3, 60);
    let expected = texts(&all(&mut joiner(&data, settings()), &events));
    append_events(&memory, &events[..40]);
    let appender = memory.appender(&Topic::events()).unwrap();
    for payload in [vec![9, 9], vec![], vec![1, 0xff]] {
        appender.append(&[Record { id: 0, payload }]).unwrap();
    }
    append_events(&memory, &[shown(9000, 1, 7, 1)]);
    append_events(&memory, &events[40..]);
    // The second one starts without a state: it meets the same events again.
    for _ in 0..2 {
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        let mut runner =
            Runner::open(memory.clone(), &config.joiner().unwrap(), &data, metrics, stop).unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(streams(&memory), expected);
        std::fs::remove_file(config.joiner().unwrap().state_dir.join("state")).unwrap();
    }
    let letters = dead_letters::list(&*memory).unwrap().letters;
    let positions: Vec<u64> = letters.iter().map(|own| own.letter.position).collect();
    assert_eq!(positions, [40, 41, 42, 43]);
    assert!(letters[0].letter.reason.contains("format Some(9)"), "{:?}", letters[0]);
    assert!(letters[3].letter.reason.contains("no surface 7"), "{:?}", letters[3]);
}

#[test]
fn an_ingest_host_that_is_ahead_of_the_streams_server_closes_no_window() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let memory = Arc::new(MemoryEngine::default());
    let ingested = |ingested_ms, event: EventRecord| EventRecord { ingested_ms, ..event };
    append_events(
        &memory,
        &[
            ingested(1_000_000, shown(7, 1, 0, 1_000_000)),
            ingested(4_600_000, tick(4_600_000)),
            ingested(4_600_000, shown(8, 1, 0, 1_290_000)),
        ],
    );
    for (stored_ms, joined) in [(1_000_100, 0), (4_600_100, 1)] {
        let config = config(&dir.path().join(stored_ms.to_string()));
        let streams = memory.clone();
        let engine = Arc::new(Stamped { streams, stored_ms });
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        let mut runner =
            Runner::open(engine, &config.joiner().unwrap(), &data, metrics, stop).unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(memory.span(&Topic::joined()).unwrap().end, joined, "stored at {stored_ms}");
    }
}

#[test]
fn events_that_were_lost_are_told_before_new_ones_take_their_place() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let mut config = config(dir.path());
    // Only the first state is saved, so a restart must produce all records again.
    config.join.save_every_events = 1 << 40;
    let events = random(5, 150);
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &events);
    let open = |engine: &Arc<MemoryEngine>, config: &Config, gaps: &Arc<GapCount>| {
        let stop = Shutdown::default();
        Runner::open(engine.clone(), &config.joiner().unwrap(), &data, gaps.clone(), stop).unwrap()
    };
    let mut whole = open(&memory, &config, &Arc::default());
    while whole.step(Duration::ZERO).unwrap() > 0 {}
    drop(whole);
    // The events lose their second half, and the joiner's own streams have its results.
    let cut = Arc::new(MemoryEngine::default());
    append_events(&cut, &events[..events.len() / 2]);
    for topic in [Topic::joined(), Topic::outcomes()] {
        let stored = memory.reader(&topic, 0).unwrap().next(1 << 20, Duration::ZERO).unwrap();
        let payloads = stored.into_iter().map(|record| record.payload);
        let records: Vec<Record> = payloads.map(|payload| Record { id: 0, payload }).collect();
        cut.appender(&topic).unwrap().append(&records).unwrap();
    }
    let gaps = Arc::default();
    let error = open(&cut, &config, &gaps).step(Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("stream events") && error.contains("on_gap"), "{error}");
    config.engine.on_gap = OnGap::Continue;
    let mut runner = open(&cut, &config, &gaps);
    runner.step(Duration::ZERO).unwrap();
    assert_eq!(gaps.0.load(Ordering::Relaxed), 2);
    let before = cut.span(&Topic::joined()).unwrap().end;
    append_events(&cut, &[shown(1000, 1, 0, (1 << 52) + 1), tick(1 << 53)]);
    while runner.step(Duration::ZERO).unwrap() > 0 {}
    assert!(cut.span(&Topic::joined()).unwrap().end > before, "new events are joined");
    // What it went on with is saved: the next start has nothing to tell.
    drop(runner);
    let mut again = open(&cut, &config, &gaps);
    while again.step(Duration::ZERO).unwrap() > 0 {}
    assert_eq!(gaps.0.load(Ordering::Relaxed), 2);
}

#[test]
fn other_events_in_place_of_lost_ones_are_told_and_joined() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let mut config = config(dir.path());
    // Only the first state is saved, so a restart makes all records again.
    config.join.save_every_events = 1 << 40;
    let events = random(5, 150);
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &events);
    let stop = Shutdown::default;
    let settings = config.joiner().unwrap();
    let whole = Runner::open(memory.clone(), &settings, &data, Arc::new(NoMetrics), stop());
    let mut whole = whole.unwrap();
    while whole.step(Duration::ZERO).unwrap() > 0 {}
    drop(whole);
    // While the joiner is away, the events lose their second half, and others come.
    let regrown = Arc::new(MemoryEngine::default());
    append_events(&regrown, &events[..events.len() / 2]);
    let others = 1000..1000 + events.len() as u64;
    let other = |request: u64| shown(request, 1, 0, (1 << 51) + request as i64);
    append_events(&regrown, &others.clone().map(other).collect::<Vec<EventRecord>>());
    append_events(&regrown, &[tick(1 << 52)]);
    assert!(regrown.span(&Topic::events()).unwrap().end > events.len() as u64);
    for topic in [Topic::joined(), Topic::outcomes()] {
        let stored = memory.reader(&topic, 0).unwrap().next(1 << 20, Duration::ZERO).unwrap();
        let payloads = stored.into_iter().map(|record| record.payload);
        let records: Vec<Record> = payloads.map(|payload| Record { id: 0, payload }).collect();
        regrown.appender(&topic).unwrap().append(&records).unwrap();
    }
    let gaps: Arc<GapCount> = Arc::default();
    let before = streams(&regrown);
    let stopped = Runner::open(regrown.clone(), &settings, &data, gaps.clone(), stop());
    let error = stopped.unwrap().step(Duration::ZERO).unwrap_err().to_string();
    assert!(error.contains("give another result") && error.contains("on_gap"), "{error}");
    assert_eq!(streams(&regrown), before, "nothing is stored before an operator decides");
    config.engine.on_gap = OnGap::Continue;
    let settings = config.joiner().unwrap();
    for _ in 0..2 {
        let runner = Runner::open(regrown.clone(), &settings, &data, gaps.clone(), stop());
        let mut runner = runner.unwrap();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(gaps.0.load(Ordering::Relaxed), 2, "once a start, and not behind it");
    }
    let (joined, _) = streams(&regrown);
    for request in others {
        let of = format!("request: {request},");
        assert_eq!(joined.iter().filter(|text| text.contains(&of)).count(), 1, "{of}");
    }
}

/// Stores what a joiner made.
fn append_outputs(streams: &MemoryEngine, made: &JoinerOutput) {
    let record = |payload| Record { id: 0, payload };
    let joined = made.joined.iter().map(|own| record(postcard::to_allocvec(own).unwrap()));
    let outcomes = made.outcomes.iter().map(|own| record(postcard::to_allocvec(own).unwrap()));
    let append = |topic: Topic, records: Vec<Record>| {
        streams.appender(&topic).unwrap().append(&records).unwrap();
    };
    append(Topic::joined(), joined.collect());
    append(Topic::outcomes(), outcomes.collect());
}

#[test]
fn a_joiner_without_its_state_repeats_its_records_by_the_rules_that_made_them() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let ingested = |ingested_ms, event: EventRecord| EventRecord { ingested_ms, ..event };
    let events = [
        ingested(1000, shown(7, 1, 0, 1000)),
        // Of a fast clock: once it closed the window of the request before.
        ingested(1000, shown(8, 2, 0, 500_000)),
        ingested(2000, acted(7, 1, 1500, CLICK, CLICK | LIKE)),
        ingested(3000, acted(8, 2, 2500, CLICK, CLICK | LIKE)),
    ];
    let later = [
        ingested(600_000, shown(9, 3, 0, 600_000)),
        ingested(600_000, shown(10, 4, 0, 5_000_000)),
        ingested(601_000, acted(9, 3, 600_500, CLICK, CLICK | LIKE)),
    ];
    let made = |bounded_by_arrival| {
        let mut joiner = joiner(&data, settings());
        joiner.bounded_by_arrival = bounded_by_arrival;
        let by_rules = |event: EventRecord| match bounded_by_arrival {
            true => event.bounded(None),
            false => event,
        };
        all(&mut joiner, &events.clone().map(by_rules))
    };
    assert_ne!(texts(&made(true)), texts(&made(false)));
    for bounded in [true, false] {
        let config = config(&dir.path().join(bounded.to_string()));
        let memory = Arc::new(MemoryEngine::default());
        append_events(&memory, &events);
        append_outputs(&memory, &made(bounded));
        let open = || {
            let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
            Runner::open(memory.clone(), &config.joiner().unwrap(), &data, metrics, stop).unwrap()
        };
        // Killed at once: the rules are saved.
        drop(open());
        let mut runner = open();
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        assert_eq!(streams(&memory), texts(&made(bounded)), "each once, bounded: {bounded}");
        append_events(&memory, &later);
        while runner.step(Duration::ZERO).unwrap() > 0 {}
        let (joined, _) = streams(&memory);
        let of_nine: Vec<&String> =
            joined.iter().filter(|text| text.contains("request: 9,")).collect();
        assert_eq!(of_nine.len(), 1, "no correction: new events have the new rules: {of_nine:?}");
    }
}

#[test]
fn records_that_a_joiner_without_its_state_does_not_make_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let events = random(5, 150);
    let mut other = settings();
    (other.first_window_s, other.min_window_s) = (600, 600);
    let made = all(&mut joiner(&data, other), &events);
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &events);
    append_outputs(&memory, &made);
    let mut config = config(dir.path());
    let open = |config: &Config| {
        let (metrics, stop) = (Arc::new(NoMetrics), Shutdown::default());
        Runner::open(memory.clone(), &config.joiner().unwrap(), &data, metrics, stop)
    };
    for _ in 0..2 {
        let error = open(&config).err().unwrap().to_string();
        assert!(error.contains("stream joined: the record at position"), "{error}");
        assert!(error.contains("Restore the state") && error.contains("on_gap"), "{error}");
    }
    config.engine.on_gap = OnGap::Continue;
    let mut runner = open(&config).unwrap();
    while runner.step(Duration::ZERO).unwrap() > 0 {}
    let (joined, expected) = (streams(&memory).0, texts(&made).0);
    assert_eq!(joined[..expected.len()], expected[..], "what is stored stays");
}

#[test]
fn outputs_are_compared_up_to_missing_events_and_the_rest_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let data = dataset(&dir.path().join("data"));
    let events = random(5, 150);
    let mut other = settings();
    (other.first_window_s, other.min_window_s) = (600, 600);
    let memory = Arc::new(MemoryEngine::default());
    append_events(&memory, &events);
    append_outputs(&memory, &all(&mut joiner(&data, other), &events));
    let stop = Shutdown::default();
    let rehearsed = |first_missing: u64| {
        let hole = first_missing..first_missing + 3;
        let engine = &holed(&memory, &Topic::events(), std::slice::from_ref(&hole));
        let rehearsal = Rehearsal { engine, policy: OnGap::Stop, stop: &stop };
        rehearsal.joiner(|| Ok(joiner(&data, settings())))
    };
    let error = rehearsed(events.len() as u64 - 3).err().unwrap().to_string();
    assert!(error.contains("is not the one that this joiner makes"), "{error}");
    // The outputs differ behind the hole alone.
    for first_missing in [0, 2] {
        let told = rehearsed(first_missing).unwrap().not_compared.unwrap();
        let missing = format!("the record at position {first_missing} was deleted");
        assert!(told.contains("stream events") && told.contains(&missing), "{told}");
        let [joined, outcomes] =
            [Topic::joined(), Topic::outcomes()].map(|topic| memory.span(&topic).unwrap().end);
        let joined = format!("stream joined from position 0 on (of {joined})");
        assert!(told.contains(&joined), "{told}");
        assert!(told.contains(&format!("on (of {outcomes})")), "{told}");
    }
    let engine = &MemoryEngine::default();
    append_events(engine, &events);
    append_outputs(engine, &all(&mut joiner(&data, settings()), &events));
    let rehearsal = Rehearsal { engine, policy: OnGap::Stop, stop: &stop };
    let whole = rehearsal.joiner(|| Ok(joiner(&data, settings()))).unwrap();
    assert_eq!(whole.not_compared, None);
}
