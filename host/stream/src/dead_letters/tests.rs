//! Letters of a reader that is killed and comes back, and orders to try their records again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hypercast_core::shutdown::Shutdown;

use super::*;
use crate::streams::tests::holes::holed;
use crate::streams::{Appended, Appender, DirectoryEngine, MemoryEngine, Reader};

fn queue(engine: &Arc<dyn StreamEngine>, version: &str, from: Option<u64>) -> DeadLetterQueue {
    let reader = LetterReader::Trainer(Topic::fm(version));
    open(engine, LetterScope { reader: &reader, source: "joined" }, from)
}

fn open(engine: &Arc<dyn StreamEngine>, of: LetterScope<'_>, from: Option<u64>) -> DeadLetterQueue {
    DeadLetterQueue::open(engine.clone(), of, from, Arc::default(), Shutdown::default()).unwrap()
}

fn unusable(position: u64, retries: u32) -> UnusableRecord {
    let (request, checksum, reason) = (Some(7), None, "it is odd".into());
    UnusableRecord { position, retries, request, checksum, reason }
}

fn numbers(engine: &dyn StreamEngine) -> Vec<u64> {
    list(engine).unwrap().letters.iter().map(|letter| letter.number).collect()
}

fn with_records(engine: Arc<dyn StreamEngine>, topic: &Topic) -> Arc<dyn StreamEngine> {
    let record = |text: u8| Record { id: 0, payload: vec![text] };
    engine.appender(topic).unwrap().append(&[1, 2, 3].map(record)).unwrap();
    engine
}

fn an_order_reaches_its_reader_once(engine: Arc<dyn StreamEngine>) {
    let engine = with_records(engine, &Topic::joined());
    let mut first = queue(&engine, "1.0.0", None);
    first.set_aside(vec![unusable(1, 0), unusable(2, 0)]).unwrap();
    let mut other = queue(&engine, "2.0.0", None);
    other.set_aside(vec![unusable(1, 0)]).unwrap();
    // The reader was killed before it saved where it stands.
    queue(&engine, "1.0.0", None).set_aside(vec![unusable(1, 0), unusable(2, 0)]).unwrap();
    assert_eq!(numbers(&*engine), [0, 1, 2], "a letter for each record and reader");

    let found = retry(&*engine, 1).unwrap();
    assert_eq!((found.letter.reader.as_str(), found.letter.position), ("fm-1_0_0", 2));
    assert_eq!(found.letter.record(&*engine).unwrap(), [3]);
    let twice = retry(&*engine, 1).unwrap_err().to_string();
    assert!(twice.contains("tried again already"), "{twice}");
    let ordered = first.orders();
    assert_eq!(ordered.iter().map(|own| (own.position, own.retries)).collect::<Vec<_>>(), [(2, 1)]);
    assert_eq!(other.orders(), [], "another reader's");
    // It fails again, and is killed: what it saved says whether the order was carried out.
    first.set_aside(vec![unusable(2, 1)]).unwrap();
    assert_eq!(queue(&engine, "1.0.0", Some(first.position())).orders(), []);
    assert_eq!(queue(&engine, "1.0.0", Some(0)).orders().len(), 1);
    let letters = list(&*engine).unwrap().letters;
    let last = letters.last().unwrap();
    assert_eq!((last.number, last.retried, last.letter.retries), (4, false, 1), "a new letter");
    assert!(letters[1].retried && !letters[0].retried);
}

#[test]
fn an_order_reaches_its_reader_once_in_memory_and_in_a_directory() {
    an_order_reaches_its_reader_once(Arc::new(MemoryEngine::default()));
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().to_path_buf();
    let settings = hypercast_config::EngineSettings { dir, ..Default::default() };
    an_order_reaches_its_reader_once(Arc::new(
        DirectoryEngine::open(&settings, &Shutdown::default()).unwrap(),
    ));
}

#[test]
fn an_event_goes_back_into_its_stream_and_some_letters_are_final() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::events());
    let open = |reader, source| open(&engine, LetterScope { reader: &reader, source }, None);
    open(LetterReader::Joiner, "events").set_aside(vec![unusable(1, 0)]).unwrap();
    open(LetterReader::Logging, "joined").set_aside(vec![unusable(1, 0)]).unwrap();
    open(LetterReader::Features, "outcomes").set_aside(vec![unusable(1, 0)]).unwrap();
    retry(&*engine, 0).unwrap();
    let mut reader = engine.reader(&Topic::events(), 0).unwrap();
    let events: Vec<Vec<u8>> =
        reader.next(9, Duration::ZERO).unwrap().into_iter().map(|own| own.payload).collect();
    assert_eq!(events, [[1], [2], [3], [2]]);
    for number in [1, 2] {
        let error = retry(&*engine, number).unwrap_err().to_string();
        assert!(error.contains("stays set aside"), "{error}");
    }
    let error = retry(&*engine, 99).unwrap_err().to_string();
    assert!(error.contains("there is no dead letter 99"), "{error}");
}

#[test]
fn what_can_no_longer_be_read_is_not_tried_again() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::joined());
    queue(&engine, "1.0.0", None).set_aside(vec![unusable(1, 0)]).unwrap();
    engine.trim(&Topic::joined(), 2).unwrap();
    let error = retry(&*engine, 0).unwrap_err().to_string();
    assert!(error.contains("position 1 was deleted"), "{error}");
    assert!(!list(&*engine).unwrap().letters[0].retried);
}

#[test]
fn the_newest_letters_are_kept_and_a_reader_that_was_away_goes_on_with_them() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::joined());
    let mut away = queue(&engine, "1.0.0", Some(0));
    let rate = Arc::new(SetAsideRate::default());
    let reader = LetterReader::Trainer(Topic::fm("1.0.0"));
    let (of, stop) = (LetterScope { reader: &reader, source: "joined" }, Shutdown::default());
    let queue = DeadLetterQueue::open(engine.clone(), of, None, rate.clone(), stop).unwrap();
    for batch in 0..11 {
        let records = (0..1000).map(|at| unusable(batch * 1000 + at, 0)).collect();
        queue.set_aside(records).unwrap();
    }
    let long = UnusableRecord { reason: "ä".repeat(3000), ..unusable(2, 9) };
    queue.set_aside(vec![long]).unwrap();
    assert_eq!((rate.total(), rate.warning().is_some()), (11_001, true));
    let KeptLetters { letters, lost, .. } = list(&*engine).unwrap();
    assert_eq!(lost, 0, "what is no longer kept was not lost");
    assert_eq!((letters[0].number, letters.len() as u64), (1001, MAX_DEAD_LETTERS));
    assert!(letters.last().unwrap().letter.reason.len() <= REASON_BYTES);
    retry(&*engine, 11_000).unwrap();
    assert_eq!(away.orders(), [], "its place is gone; it begins at the first that is kept");
    assert!(away.position() >= 1001, "{}", away.position());
}

#[test]
fn letters_around_a_hole_are_listed_tried_again_and_the_lost_ones_are_counted() {
    let streams = Arc::new(MemoryEngine::default());
    let engine = with_records(streams.clone(), &Topic::joined());
    let written = queue(&engine, "1.0.0", None);
    (0..6).for_each(|retries| written.set_aside(vec![unusable(1, retries)]).unwrap());
    for (hole, kept) in [(2..4, vec![0, 1, 4, 5]), (5..6, vec![0, 1, 2, 3, 4])] {
        let holed = holed(&streams, &Topic::dead_letters(), std::slice::from_ref(&hole));
        assert_eq!(numbers(&holed), kept);
        assert_eq!(list(&holed).unwrap().lost, hole.end - hole.start);
    }
    let holed = holed(&streams, &Topic::dead_letters(), std::slice::from_ref(&(2..4)));
    let holed: Arc<dyn StreamEngine> = Arc::new(holed);
    let mut reader = queue(&holed, "1.0.0", Some(0));
    retry(&*holed, 4).unwrap();
    let mut retried = Vec::new();
    for _ in 0..4 {
        reader.looked = None;
        retried.extend(reader.orders().into_iter().map(|letter| letter.retries));
    }
    assert_eq!((retried, reader.position()), (vec![5], 7));
}

#[test]
fn another_record_at_the_same_position_has_a_letter_of_its_own_and_is_not_tried_for_the_first() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::joined());
    let of = |payload: &[u8]| {
        let checksum = Some(crc32fast::hash(payload));
        UnusableRecord { checksum, ..unusable(1, 0) }
    };
    // The stream was made anew: once it had another record there.
    queue(&engine, "1.0.0", None).set_aside(vec![of(&[77])]).unwrap();
    queue(&engine, "1.0.0", None).set_aside(vec![of(&[2]), of(&[2])]).unwrap();
    queue(&engine, "1.0.0", None).set_aside(vec![unusable(1, 0)]).unwrap();
    assert_eq!(numbers(&*engine), [0, 1, 2], "letters of before have no checksum");
    let error = retry(&*engine, 0).unwrap_err().to_string();
    assert!(error.contains("not the one that was set aside"), "{error}");
    assert_eq!(retry(&*engine, 1).unwrap().letter.checksum, Some(crc32fast::hash(&[2])));
    retry(&*engine, 2).unwrap();
}

/// Stores a letter as a release without checksums wrote it.
fn set_aside_earlier(engine: &Arc<dyn StreamEngine>, record: UnusableRecord) {
    assert_eq!(record.checksum, None);
    queue(engine, "1.0.0", None).set_aside(vec![record]).unwrap();
}

#[test]
fn a_record_that_an_earlier_release_set_aside_gets_no_second_letter() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::joined());
    let now = |position, retries, request| {
        let checksum = Some(crc32fast::hash(&[position as u8 + 1]));
        UnusableRecord { checksum, request, ..unusable(position, retries) }
    };
    set_aside_earlier(&engine, unusable(1, 0));
    let upgraded = queue(&engine, "1.0.0", None);
    upgraded.set_aside(vec![now(1, 0, Some(7)), now(2, 0, Some(7))]).unwrap();
    assert_eq!(numbers(&*engine), [0, 1], "of the second record alone");
    // It may not read the record, or read what the other could not.
    upgraded.set_aside(vec![now(1, 0, None)]).unwrap();
    // Another process still runs the earlier release, beside this one.
    set_aside_earlier(&engine, unusable(0, 3));
    upgraded.set_aside(vec![now(0, 3, Some(7))]).unwrap();
    assert_eq!(numbers(&*engine), [0, 1, 2]);
    // Another attempt, another reader and another record have letters of their own.
    upgraded.set_aside(vec![now(1, 1, Some(7))]).unwrap();
    queue(&engine, "2.0.0", None).set_aside(vec![now(1, 0, Some(7))]).unwrap();
    upgraded.set_aside(vec![now(1, 0, Some(8))]).unwrap();
    assert_eq!(numbers(&*engine), [0, 1, 2, 3, 4, 5]);
    let again = queue(&engine, "1.0.0", None);
    again.set_aside(vec![now(1, 0, Some(7)), now(0, 3, Some(7)), now(2, 0, Some(7))]).unwrap();
    assert_eq!(numbers(&*engine).len(), 6, "nor after the next start");
}

#[test]
fn a_letter_of_an_earlier_release_loads_and_keeps_its_id() {
    let stored = r#"{"kind":"set-aside","reader":"join","source":"events","position":40,"retries":1,
        "request":null,"reason":"it is odd","time_ms":5}"#;
    let Some(LetterRecord::SetAside(letter)) = decode(3, stored.as_bytes()) else { panic!() };
    assert_eq!((letter.position, letter.checksum), (40, None));
    assert_eq!(letter.id(), 0xaf6fc0a7744ef1e);
    let checksum = Some(0);
    assert_ne!(DeadLetter { checksum, ..letter.clone() }.id(), letter.id());
    assert!(!serde_json::to_string(&letter).unwrap().contains("checksum"));
}

/// An engine that stores nothing.
struct Unreachable(MemoryEngine);

impl StreamEngine for Unreachable {
    fn appender(&self, _: &Topic) -> Result<Arc<dyn Appender>> {
        Err(Error::unreachable("gone for long"))
    }

    fn resume(&self, topic: &Topic, place: StreamPlace) -> Result<Box<dyn Reader>> {
        self.0.resume(topic, place)
    }

    fn append_at(&self, _: &Topic, _: u64, _: &[Record]) -> Result<Option<Appended>> {
        Err(Error::unreachable("gone for long"))
    }

    fn span(&self, topic: &Topic) -> Result<std::ops::Range<u64>> {
        self.0.span(topic)
    }

    fn trim(&self, topic: &Topic, before: u64) -> Result<()> {
        self.0.trim(topic, before)
    }
}

#[test]
fn a_process_that_is_to_stop_does_not_wait_for_an_engine_that_is_away() {
    let engine = Arc::new(Unreachable(MemoryEngine::default()));
    let of = LetterScope { reader: &LetterReader::Joiner, source: "events" };
    let stop = Shutdown::default();
    let queue = DeadLetterQueue::open(engine, of, None, Arc::default(), stop.clone()).unwrap();
    let began = Instant::now();
    let set_aside = std::thread::spawn(move || queue.set_aside(vec![unusable(1, 0)]));
    std::thread::sleep(Duration::from_millis(1500));
    assert!(!set_aside.is_finished(), "it tries again");
    stop.request();
    let error = set_aside.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("gone for long"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
}
