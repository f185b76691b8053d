//! Letters of a reader that is killed and comes back, and orders to try their records again.

use std::sync::Arc;

use super::*;
use crate::streams::{DirectoryEngine, MemoryEngine};

fn queue(engine: &Arc<dyn StreamEngine>, version: &str, from: Option<u64>) -> DeadLetterQueue {
    let reader = LetterReader::Trainer(Topic::fm(version));
    DeadLetterQueue::open(engine.clone(), &reader, "joined", from, Arc::default()).unwrap()
}

fn unusable(position: u64, retries: u32) -> UnusableRecord {
    UnusableRecord { position, retries, request: Some(7), reason: "it is odd".into() }
}

fn numbers(engine: &Arc<dyn StreamEngine>) -> Vec<u64> {
    list(&**engine).unwrap().iter().map(|letter| letter.number).collect()
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
    assert_eq!(numbers(&engine), [0, 1, 2], "a letter for each record and reader");

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
    let letters = list(&*engine).unwrap();
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
    an_order_reaches_its_reader_once(Arc::new(DirectoryEngine::open(&settings).unwrap()));
}

#[test]
fn an_event_goes_back_into_its_stream_and_some_letters_are_final() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::events());
    let open = |reader, source| {
        DeadLetterQueue::open(engine.clone(), &reader, source, None, Arc::default()).unwrap()
    };
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
    assert!(!list(&*engine).unwrap()[0].retried);
}

#[test]
fn the_newest_letters_are_kept_and_a_reader_that_was_away_goes_on_with_them() {
    let engine = with_records(Arc::new(MemoryEngine::default()), &Topic::joined());
    let mut away = queue(&engine, "1.0.0", Some(0));
    let rate = Arc::new(SetAsideRate::default());
    let reader = LetterReader::Trainer(Topic::fm("1.0.0"));
    let queue = DeadLetterQueue::open(engine.clone(), &reader, "joined", None, rate.clone());
    let queue = queue.unwrap();
    for batch in 0..11 {
        let records = (0..1000).map(|at| unusable(batch * 1000 + at, 0)).collect();
        queue.set_aside(records).unwrap();
    }
    let long = UnusableRecord { reason: "ä".repeat(3000), ..unusable(2, 9) };
    queue.set_aside(vec![long]).unwrap();
    assert_eq!((rate.total(), rate.warning().is_some()), (11_001, true));
    let letters = list(&*engine).unwrap();
    assert_eq!((letters[0].number, letters.len() as u64), (1001, MAX_DEAD_LETTERS));
    assert!(letters.last().unwrap().letter.reason.len() <= REASON_BYTES);
    retry(&*engine, 11_000).unwrap();
    assert_eq!(away.orders(), [], "its place is gone; it begins at the first that is kept");
    assert!(away.position() >= 1001, "{}", away.position());
}
