//! NATS: the common promises, and those about a server that stops.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use hypercast_config::EngineSettings;
use hypercast_core::clock::now_ms;

use super::super::*;
use super::nats_server::{NatsServer, free_port, is_installed};
use super::suite::{self, LONG, all, gap, numbered, record, texts, topic};

/// A server alone, with its folder.
fn start() -> Option<(NatsServer, tempfile::TempDir)> {
    let dir = is_installed().then(|| tempfile::tempdir().unwrap())?;
    Some((NatsServer::start(dir.path(), ""), dir))
}

#[test]
fn nats_keeps_every_promise() {
    let Some((server, _dir)) = start() else { return };
    suite::every_promise(&*open(&server.settings()).unwrap());
}

#[test]
fn a_record_has_the_time_at_which_the_server_stored_it() {
    let Some((server, _dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("stored");
    let before_ms = now_ms();
    engine.appender(&topic).unwrap().append(&numbered(1..3)).unwrap();
    let stored = engine.reader(&topic, 0).unwrap().next(2, LONG).unwrap();
    let times: Vec<i64> = stored.iter().map(|record| record.stored_ms.unwrap()).collect();
    assert!(times.len() == 2 && times.is_sorted(), "{times:?}");
    assert!(before_ms - 1 <= times[0] && times[1] <= now_ms() + 1, "{before_ms}: {times:?}");
}

#[test]
fn opened_again_it_continues() {
    let Some((server, _dir)) = start() else { return };
    suite::opened_again_it_continues(&|| open(&server.settings()).unwrap());
}

#[test]
fn ids_are_remembered_beyond_the_servers_restart() {
    let Some((mut server, _dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("restart");
    let appender = engine.appender(&topic).unwrap();
    appender.append(&numbered(1..101)).unwrap();
    server.restart();
    let other = open(&server.settings()).unwrap();
    assert_eq!(appender.append(&numbered(91..111)).unwrap(), Appended { end: 110, repeated: 10 });
    let appended = other.appender(&topic).unwrap().append(&numbered(1..111)).unwrap();
    assert_eq!(appended, Appended { end: 110, repeated: 110 });
    assert_eq!(all(&*engine, &topic, 0), texts(1..111));
}

#[test]
fn several_processes_append_to_a_stream() {
    const EACH: u64 = 1000;
    let Some((server, _dir)) = start() else { return };
    let topic = topic("several");
    thread::scope(|scope| {
        for of in 1..=3 {
            let (server, topic) = (&server, &topic);
            scope.spawn(move || {
                let engine = open(&server.settings()).unwrap();
                let appender = engine.appender(topic).unwrap();
                for first in (0..EACH).step_by(100) {
                    let ids = of * 10_000 + first..of * 10_000 + first + 100;
                    assert_eq!(appender.append(&numbered(ids)).unwrap().repeated, 0);
                }
            });
        }
    });
    let texts = all(&*open(&server.settings()).unwrap(), &topic, 0);
    assert_eq!(texts.len() as u64, 3 * EACH);
    for of in 1..=3 {
        let own = texts.iter().map(|text| text.parse::<u64>().unwrap());
        let own = own.filter(|id| id / 10_000 == of);
        assert!(own.eq(of * 10_000..of * 10_000 + EACH), "the records of {of}, in order");
    }
}

#[test]
fn a_server_that_is_killed_during_appends_loses_and_doubles_nothing() {
    const RECORDS: u64 = 60_000;
    let Some((mut server, _dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("killed");
    let append = |ids: Range<u64>| {
        let appender = engine.appender(&topic).unwrap();
        for first in ids.clone().step_by(500) {
            let batch = numbered(first..(first + 500).min(ids.end));
            appender.append(&batch).unwrap();
        }
    };
    thread::scope(|scope| {
        // One writer with ids in calls of 500, and one that expects the stream's end.
        scope.spawn(|| append(1..RECORDS));
        scope.spawn(|| {
            let topic = suite::topic("decided");
            let appender = engine.appender(&topic).unwrap();
            for end in (0..6000).step_by(30) {
                let records: Vec<_> = (end..end + 30).map(|id| record(7, id)).collect();
                assert!(appender.append_at(end, &records).unwrap().is_some(), "at {end}");
            }
        });
        let read = scope.spawn(|| {
            let mut reader = engine.reader(&topic, 0).unwrap();
            while reader.position() < RECORDS - 1 {
                let read = reader.next(5000, LONG).unwrap();
                assert!(!read.is_empty(), "nothing behind {}", reader.position());
                for stored in read {
                    let text = (stored.position + 1).to_string();
                    assert_eq!(stored.payload, text.into_bytes());
                }
            }
        });
        let mut watch = engine.reader(&topic, 0).unwrap();
        for kill in 1..=3 {
            // During the appends.
            while watch.position() < kill * RECORDS / 5 {
                assert!(!watch.next(10_000, LONG).unwrap().is_empty());
            }
            server.restart();
        }
        read.join().unwrap();
    });
    assert_eq!(engine.span(&topic).unwrap(), 0..RECORDS - 1);
    assert_eq!(all(&*engine, &suite::topic("decided"), 0), texts(0..6000));
}

#[test]
fn the_oldest_go_beyond_what_is_to_be_kept() {
    let Some((server, _dir)) = start() else { return };
    let settings = EngineSettings { retain_mib: 1, ..server.settings() };
    let engine = open(&settings).unwrap();
    let topic = topic("retained");
    let appender = engine.appender(&topic).unwrap();
    for id in 1..=30 {
        appender.append(&[Record { id, payload: vec![b'x'; 100_000] }]).unwrap();
    }
    let span = engine.span(&topic).unwrap();
    assert!(span.end == 30 && (20..28).contains(&span.start), "{span:?}");
    let gone = engine.reader(&topic, 0).unwrap().next(1, LONG).unwrap_err();
    assert_eq!(gap(gone).cause, GapCause::Deleted { first: span.start });
    assert_eq!(engine.reader(&topic, span.start).unwrap().next(1, LONG).unwrap().len(), 1);
}

#[test]
fn an_unreachable_server_is_named() {
    let port = free_port();
    let nats_url = format!("nats://anna:geheim@127.0.0.1:{port}").into();
    let settings = EngineSettings { kind: EngineKind::Nats, nats_url, ..EngineSettings::default() };
    let error = open(&settings).err().unwrap().to_string();
    let shown = format!("{error} {settings:?}");
    assert!(!shown.contains("geheim") && !shown.contains("anna"), "{shown}");
    let named = format!("nats://***@127.0.0.1:{port}: ");
    assert!(error.contains(&named) && error.contains("nats-server -js"), "{error}");
    let settings = EngineSettings { nats_prefix: "a-b".into(), ..settings };
    assert!(open(&settings).err().unwrap().to_string().contains("engine.nats_prefix"));
}

#[test]
fn a_process_that_is_to_stop_repeats_nothing_that_a_server_does_not_answer() {
    let Some((mut server, _dir)) = start() else { return };
    let (stop, topic) = (Shutdown::default(), topic("stopped"));
    let engine = open_with_shutdown(&server.settings(), &stop).unwrap();
    let appender = engine.appender(&topic).unwrap();
    appender.append(&numbered(1..4)).unwrap();
    server.kill();
    thread::scope(|scope| {
        let asks = [
            scope.spawn(|| engine.span(&topic).err().unwrap()),
            scope.spawn(|| appender.append(&numbered(4..5)).err().unwrap()),
        ];
        thread::sleep(Duration::from_secs(2));
        assert!(asks.iter().all(|asked| !asked.is_finished()), "the server may come back");
        let asked = std::time::Instant::now();
        stop.request();
        for error in asks.map(|asked| asked.join().unwrap().to_string()) {
            assert!(error.contains("cannot"), "{error}");
        }
        let limit = Duration::from_secs(15);
        assert!(asked.elapsed() < limit, "{:?}, of 30 s without a stop", asked.elapsed());
    });
    server.begin();
    server.wait_until_healthy();
    let asked = (0..50).find_map(|_| {
        thread::sleep(Duration::from_millis(200));
        engine.span(&topic).ok()
    });
    assert_eq!(asked.unwrap().start, 0, "what it is asked for is still done");
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

#[test]
fn a_stream_that_is_restored_or_made_anew_is_told() {
    let Some((mut server, dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("restored");
    let append = |ids| {
        // A process of its own.
        let engine = open(&server.settings()).unwrap();
        engine.appender(&topic).unwrap().append(&numbered(ids)).unwrap()
    };
    append(1..11);
    let mut reader = engine.reader(&topic, 0).unwrap();
    let early = StreamPlace::after(reader.next(5, LONG).unwrap().last().unwrap());
    let backup = dir.path().join("backup");
    let settings = server.settings();
    server.kill();
    copy(&server.store(), &backup);
    server.begin();
    let append = |ids| {
        let engine = open(&settings).unwrap();
        engine.appender(&topic).unwrap().append(&numbered(ids)).unwrap()
    };
    append(11..21);
    while reader.position() < 20 {
        reader.next(100, LONG).unwrap();
    }
    let place = StreamPlace::after(&engine.reader(&topic, 19).unwrap().next(1, LONG).unwrap()[0]);
    server.kill();
    fs::remove_dir_all(server.store()).unwrap();
    copy(&backup, &server.store());
    server.begin();
    // An open reader, while the stream is shorter than what was read.
    let error = reader.next(1, LONG).unwrap_err();
    assert_eq!(gap(error).cause, GapCause::Cut { end: 10 });
    append(100..125);
    let resume = |place| engine.resume(&topic, place).unwrap().next(1, LONG);
    assert_eq!(gap(resume(place).unwrap_err()).cause, GapCause::Changed { first: 0 });
    assert_eq!(resume(early).unwrap()[0].payload, b"6", "what was read before the backup is there");
    server.kill();
    fs::remove_dir_all(server.store()).unwrap();
    server.begin();
    append(200..240);
    assert_eq!(gap(resume(early).unwrap_err()).cause, GapCause::Changed { first: 0 });
}

#[test]
fn ids_of_a_tail_that_was_lost_can_be_stored_again() {
    let Some((mut server, dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("tail");
    let appender = engine.appender(&topic).unwrap();
    appender.append(&numbered(1..6)).unwrap();
    let backup = dir.path().join("backup");
    server.kill();
    copy(&server.store(), &backup);
    server.begin();
    appender.append(&numbered(6..11)).unwrap();
    server.kill();
    fs::remove_dir_all(server.store()).unwrap();
    copy(&backup, &server.store());
    server.begin();
    // The next append finds that the stream is shorter than it was.
    assert_eq!(appender.append(&numbered(11..12)).unwrap().end, 6);
    let again = appender.append(&numbered(1..12)).unwrap();
    assert_eq!((again.end, again.repeated), (11, 6));
}

#[test]
fn records_that_were_deleted_amid_others_are_told() {
    let Some((server, _dir)) = start() else { return };
    let engine = open(&server.settings()).unwrap();
    let topic = topic("holes");
    engine.appender(&topic).unwrap().append(&numbered(1..21)).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = async_nats::connect(format!("127.0.0.1:{}", server.port)).await.unwrap();
        let streams = async_nats::jetstream::new(client);
        let stream = streams.get_stream(format!("test-{topic}")).await.unwrap();
        for sequence in [7, 8, 13] {
            assert!(stream.delete_message(sequence).await.unwrap());
        }
    });
    let mut cursor = StreamCursor::open(&*engine, &topic, StreamPlace::at(0)).unwrap();
    let (mut read, mut gaps) = (Vec::new(), Vec::new());
    while cursor.place().position < 20 {
        match cursor.next(&*engine, 100, LONG).unwrap() {
            StreamRead::Records(records) => {
                let texts = records.iter().map(|record| String::from_utf8_lossy(&record.payload));
                read.extend(texts.map(|text| text.parse::<u64>().unwrap()));
            }
            StreamRead::Gap(gap) => gaps.push((gap.position, gap.cause)),
        }
    }
    assert_eq!(read, (1..21).filter(|id| ![7, 8, 13].contains(id)).collect::<Vec<_>>());
    let deleted = |first| GapCause::Deleted { first };
    assert_eq!(gaps, [(6, deleted(8)), (12, deleted(13))]);
}
