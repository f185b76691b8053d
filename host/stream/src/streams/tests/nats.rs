//! NATS: the common promises, and those about a server that stops.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;

use hypercast_core::clock::now_ms;
use hypercast_core::prerequisite::skip;

use super::super::*;
use super::suite::{self, LONG, all, numbered, record, texts, topic};

/// A server of this test; it ends with it.
struct TestServer {
    dir: tempfile::TempDir,
    port: u16,
    process: Child,
}

impl TestServer {
    fn start() -> Option<TestServer> {
        let found = Command::new("nats-server").arg("--version").output();
        if found.is_err() {
            skip("NATS", "nats-server is not in PATH: apt-get install nats-server");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let process = spawn(dir.path(), port);
        Some(TestServer { dir, port, process })
    }

    fn settings(&self) -> EngineSettings {
        EngineSettings {
            kind: EngineKind::Nats,
            nats_url: format!("nats://127.0.0.1:{}", self.port),
            nats_prefix: "test".into(),
            remembered_ids: suite::REMEMBERED,
            ..EngineSettings::default()
        }
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.kill();
        self.process = spawn(self.dir.path(), self.port);
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let killed = self.process.kill().and_then(|()| self.process.wait());
        assert!(killed.is_ok() || thread::panicking());
    }
}

fn spawn(dir: &Path, port: u16) -> Child {
    Command::new("nats-server")
        .args(["-js", "-a", "127.0.0.1", "-p", &port.to_string(), "-sd"])
        .arg(dir)
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn nats_keeps_every_promise() {
    let Some(server) = TestServer::start() else { return };
    suite::every_promise(&*open(&server.settings()).unwrap());
}

#[test]
fn a_record_has_the_time_at_which_the_server_stored_it() {
    let Some(server) = TestServer::start() else { return };
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
    let Some(server) = TestServer::start() else { return };
    suite::opened_again_it_continues(&|| open(&server.settings()).unwrap());
}

#[test]
fn ids_are_remembered_beyond_the_servers_restart() {
    let Some(mut server) = TestServer::start() else { return };
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
    let Some(server) = TestServer::start() else { return };
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
    let Some(mut server) = TestServer::start() else { return };
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
    let Some(server) = TestServer::start() else { return };
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
    assert!(matches!(gone, Error::Gone { position: 0, first, .. } if first == span.start));
    assert_eq!(engine.reader(&topic, span.start).unwrap().next(1, LONG).unwrap().len(), 1);
}

#[test]
fn an_unreachable_server_is_named() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let nats_url = format!("nats://127.0.0.1:{port}");
    let settings = EngineSettings { kind: EngineKind::Nats, nats_url, ..EngineSettings::default() };
    let error = open(&settings).err().unwrap().to_string();
    assert!(error.contains(&settings.nats_url) && error.contains("nats-server -js"), "{error}");
    let settings = EngineSettings { nats_prefix: "a-b".into(), ..settings };
    assert!(open(&settings).err().unwrap().to_string().contains("engine.nats_prefix"));
}
