//! The promises of [`StreamEngine`], each a function of an engine and a stream of its own.

use std::sync::Barrier;
use std::thread;

use super::super::*;

/// The number of ids that the engines under test remember.
pub(super) const REMEMBERED: usize = 10_000;

/// Longer than anything in these tests takes.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// All promises that do not need the engine to be opened again.
pub(super) fn every_promise(engine: &dyn StreamEngine) {
    records_come_back_in_order(engine, &topic("order"));
    a_missing_stream_is_empty(engine, &topic("absent"));
    repeated_ids_are_skipped(engine, &topic("repeated"));
    a_reader_waits_for_the_first(engine, &topic("wait"));
    of_two_that_race_one_appends(engine, &topic("race"));
    what_is_trimmed_is_gone(engine, &topic("trim"));
    a_long_record_is_refused(engine, &topic("long"));
    each_threads_records_are_appended_in_order(engine, &topic("threads"));
    a_reader_reads_beside_a_writer(engine, &topic("beside"));
    topics_do_not_meet(engine, &topic("one"), &topic("two"));
    a_place_is_compared_with_the_stream(engine, &topic("place"));
}

/// What an engine that is opened again, as by the next process, knows of earlier appends.
pub(super) fn opened_again_it_continues(open: &dyn Fn() -> Arc<dyn StreamEngine>) {
    let topic = topic("again");
    for round in 0..3 {
        let engine = open();
        let appender = engine.appender(&topic).unwrap();
        let before = appender.append(&numbered(1..1 + 20 * round)).unwrap();
        assert_eq!(before, Appended { end: 20 * round, repeated: 20 * round as usize });
        let half = numbered(11 + 20 * round..21 + 20 * round);
        assert_eq!(
            appender.append(&numbered(1 + 20 * round..11 + 20 * round)).unwrap().repeated,
            0
        );
        assert_eq!(appender.append(&half).unwrap().end, 20 * (round + 1));
        assert_eq!(appender.append(&half).unwrap().repeated, 10);
        assert_eq!(engine.span(&topic).unwrap(), 0..20 * (round + 1));
        assert_eq!(all(&*engine, &topic, 0), texts(1..1 + 20 * (round + 1)));
    }
    assert_eq!(all(&*open(), &topic, 20), texts(21..61));
}

pub(super) fn topic(name: &str) -> Topic {
    Topic::expert("suite", name)
}

pub(super) fn record(id: u64, text: impl ToString) -> Record {
    Record { id, payload: text.to_string().into_bytes() }
}

/// Records whose text is their id.
pub(super) fn numbered(ids: Range<u64>) -> Vec<Record> {
    ids.map(|id| record(id, id)).collect()
}

/// The missing records that an error reports.
pub(super) fn gap(error: Error) -> StreamGap {
    match error {
        Error::Gap(gap) => gap,
        other => panic!("{other}"),
    }
}

/// All records from a position to the end as text; checks that positions are consecutive.
pub(super) fn all(engine: &dyn StreamEngine, topic: &Topic, from: u64) -> Vec<String> {
    let end = engine.span(topic).unwrap().end;
    let mut reader = engine.reader(topic, from).unwrap();
    let mut texts = Vec::new();
    while reader.position() < end {
        let read = reader.next(7, LONG).unwrap();
        assert!(!read.is_empty() && read.len() <= 7);
        for stored in read {
            assert_eq!(stored.position, from + texts.len() as u64);
            texts.push(String::from_utf8(stored.payload).unwrap());
        }
        assert_eq!(reader.position(), from + texts.len() as u64);
    }
    texts
}

pub(super) fn texts(ids: Range<u64>) -> Vec<String> {
    ids.map(|id| id.to_string()).collect()
}

fn records_come_back_in_order(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    assert_eq!(appender.append(&[]).unwrap(), Appended { end: 0, repeated: 0 });
    assert_eq!(appender.append(&numbered(0..20)).unwrap(), Appended { end: 20, repeated: 0 });
    assert_eq!(appender.append(&[record(0, "")]).unwrap().end, 21, "an empty record is one");
    assert_eq!(appender.append(&numbered(20..25)).unwrap(), Appended { end: 26, repeated: 0 });
    assert_eq!(engine.span(topic).unwrap(), 0..26);
    let expected = [texts(0..20), vec![String::new()], texts(20..25)].concat();
    assert_eq!(all(engine, topic, 0), expected);
    assert_eq!(all(engine, topic, 17), expected[17..]);
}

fn a_missing_stream_is_empty(engine: &dyn StreamEngine, topic: &Topic) {
    assert_eq!(engine.span(topic).unwrap(), 0..0);
    engine.trim(topic, 5).unwrap();
    let mut reader = engine.reader(topic, 0).unwrap();
    assert!(reader.next(10, Duration::ZERO).unwrap().is_empty());
    engine.appender(topic).unwrap().append(&numbered(1..3)).unwrap();
    assert_eq!(
        reader.next(10, LONG).unwrap()[0].payload,
        b"1",
        "it follows the stream once it exists"
    );
}

fn repeated_ids_are_skipped(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    let twice = [record(7, "a"), record(8, "b"), record(7, "c"), record(0, "d"), record(0, "d")];
    assert_eq!(appender.append(&twice).unwrap(), Appended { end: 4, repeated: 1 });
    let again = [record(8, "e"), record(9, "f"), record(7, "g"), record(10, "h")];
    assert_eq!(appender.append(&again).unwrap(), Appended { end: 6, repeated: 2 });
    assert_eq!(appender.append(&again).unwrap(), Appended { end: 6, repeated: 4 });
    assert_eq!(all(engine, topic, 0), ["a", "b", "d", "d", "f", "h"]);
}

fn a_reader_waits_for_the_first(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    let mut reader = engine.reader(topic, 0).unwrap();
    assert!(reader.next(10, Duration::from_millis(5)).unwrap().is_empty());
    thread::scope(|scope| {
        let waiting = scope.spawn(|| reader.next(10, LONG).unwrap());
        appender.append(&[record(1, "here")]).unwrap();
        assert_eq!(waiting.join().unwrap()[0].payload, b"here");
    });
    assert_eq!(reader.position(), 1);
}

fn of_two_that_race_one_appends(engine: &dyn StreamEngine, topic: &Topic) {
    const ROUNDS: u64 = 20;
    let start = Barrier::new(2);
    let won: u64 = thread::scope(|scope| {
        let race = |name: &'static str| {
            let start = &start;
            scope.spawn(move || {
                let mut won = 0;
                for round in 0..ROUNDS {
                    start.wait();
                    let records = [record(1, name), record(1, round)];
                    let appended = engine.append_at(topic, 2 * round, &records).unwrap();
                    assert!(appended.is_none_or(|appended| appended.end == 2 * round + 2));
                    won += u64::from(appended.is_some());
                }
                won
            })
        };
        let racers = [race("left"), race("right")];
        racers.into_iter().map(|racer| racer.join().unwrap()).sum()
    });
    assert_eq!(won, ROUNDS);
    let texts = all(engine, topic, 0);
    let rounds: Vec<_> = texts.chunks(2).map(|pair| pair[1].clone()).collect();
    assert_eq!(rounds, self::texts(0..ROUNDS), "two records of one call stay together");
    assert_eq!(engine.append_at(topic, 2 * ROUNDS - 1, &numbered(0..1)).unwrap(), None);
    assert_eq!(engine.append_at(topic, 2 * ROUNDS + 1, &numbered(0..1)).unwrap(), None);
    let appended = engine.appender(topic).unwrap().append(&[record(1, "after")]).unwrap();
    assert_eq!(appended, Appended { end: 2 * ROUNDS + 1, repeated: 0 });
}

fn what_is_trimmed_is_gone(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    for first in (0..200).step_by(10) {
        appender.append(&numbered(first..first + 10)).unwrap();
    }
    let mut slow = engine.reader(topic, 0).unwrap();
    assert_eq!(slow.next(1, LONG).unwrap().len(), 1);
    engine.trim(topic, 150).unwrap();
    let span = engine.span(topic).unwrap();
    assert!(span.start > 100 && span.start <= 150 && span.end == 200, "{span:?}");
    assert_eq!(all(engine, topic, span.start), texts(span.start..200));
    let gone = engine.reader(topic, 3).and_then(|mut reader| reader.next(1, LONG)).unwrap_err();
    let deleted = GapCause::Deleted { first: span.start };
    assert_eq!(gap(gone), StreamGap { topic: topic.clone(), position: 3, cause: deleted });
    // A reader may still return what it has read already, in order; then it returns the error.
    let error = loop {
        let at = slow.position();
        match slow.next(50, LONG) {
            Ok(read) => assert!(read[0].position == at && at < span.start),
            Err(error) => break error,
        }
    };
    assert_eq!(gap(error).cause, deleted);
    engine.trim(topic, 10_000).unwrap();
    assert_eq!(engine.span(topic).unwrap().end, 200);
    assert_eq!(appender.append(&[record(1000, "on")]).unwrap().end, 201);
    assert_eq!(all(engine, topic, 200), ["on"]);
}

fn a_long_record_is_refused(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    let of = |bytes| Record { id: 0, payload: vec![b'x'; bytes] };
    let refused = appender.append(&[of(1), of(MAX_RECORD_BYTES + 1)]).unwrap_err().to_string();
    assert!(refused.contains("record 1 of 2") && refused.contains("983041 bytes"), "{refused}");
    assert!(appender.append_at(0, &[of(MAX_RECORD_BYTES + 1)]).is_err());
    assert_eq!(engine.span(topic).unwrap(), 0..0);
    for end in 1..=20 {
        assert_eq!(appender.append(&[of(MAX_RECORD_BYTES)]).unwrap().end, end);
    }
    let mut reader = engine.reader(topic, 0).unwrap();
    let first = reader.next(20, LONG).unwrap();
    assert!(first.len() < 20, "a read has a bound in bytes: {}", first.len());
    let mut read = first.len();
    while read < 20 {
        let next = reader.next(20, LONG).unwrap();
        assert!(next.iter().all(|stored| stored.payload.len() == MAX_RECORD_BYTES));
        read += next.len();
    }
}

fn each_threads_records_are_appended_in_order(engine: &dyn StreamEngine, topic: &Topic) {
    const EACH: u64 = 100;
    let appender = engine.appender(topic).unwrap();
    thread::scope(|scope| {
        for of in 1..=8 {
            let appender = &appender;
            scope.spawn(move || {
                for first in (0..EACH).step_by(4) {
                    let ids = of * 1000 + first..of * 1000 + first + 4;
                    let appended = appender.append(&numbered(ids)).unwrap();
                    assert_eq!(appended.repeated, 0);
                }
            });
        }
    });
    let texts = all(engine, topic, 0);
    assert_eq!(texts.len() as u64, 8 * EACH);
    for of in 1..=8 {
        let own =
            texts.iter().map(|text| text.parse::<u64>().unwrap()).filter(|id| id / 1000 == of);
        assert!(own.eq(of * 1000..of * 1000 + EACH), "the records of thread {of}");
    }
}

fn a_reader_reads_beside_a_writer(engine: &dyn StreamEngine, topic: &Topic) {
    const RECORDS: u64 = 2000;
    let appender = engine.appender(topic).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            for first in (0..RECORDS).step_by(40) {
                appender.append(&numbered(first..first + 40)).unwrap();
            }
        });
        let mut reader = engine.reader(topic, 0).unwrap();
        while reader.position() < RECORDS {
            for stored in reader.next(333, LONG).unwrap() {
                assert_eq!(stored.payload, stored.position.to_string().into_bytes());
            }
        }
    });
}

fn topics_do_not_meet(engine: &dyn StreamEngine, one: &Topic, two: &Topic) {
    engine.appender(one).unwrap().append(&numbered(1..5)).unwrap();
    engine.appender(two).unwrap().append(&numbered(3..4)).unwrap();
    assert_eq!(all(engine, one, 0), texts(1..5));
    assert_eq!(all(engine, two, 0), texts(3..4));
}

fn a_place_is_compared_with_the_stream(engine: &dyn StreamEngine, topic: &Topic) {
    let appender = engine.appender(topic).unwrap();
    appender.append(&numbered(0..20)).unwrap();
    let mut reader = engine.reader(topic, 0).unwrap();
    let place = StreamPlace::after(&reader.next(1, LONG).unwrap()[0]);
    let read = engine.resume(topic, place).unwrap().next(1, Duration::from_secs(5)).unwrap();
    assert_eq!((read[0].position, &read[0].payload[..]), (1, &b"1"[..]));
    let other = StreamPlace { checksum: place.checksum.map(|sum| !sum), ..place };
    let error = engine.resume(topic, other).unwrap().next(1, LONG).unwrap_err();
    let changed = GapCause::Changed { first: 0 };
    assert_eq!(gap(error), StreamGap { topic: topic.clone(), position: 1, cause: changed });
    let last = engine.reader(topic, 19).unwrap().next(1, LONG).unwrap();
    let mut at_end = engine.resume(topic, StreamPlace::after(&last[0])).unwrap();
    assert!(at_end.next(1, Duration::from_millis(5)).unwrap().is_empty());
    appender.append(&numbered(20..21)).unwrap();
    assert_eq!(at_end.next(1, LONG).unwrap()[0].payload, b"20");
}
