//! Appends to streams and reads of them: a directory with and without syncs, and
//! NATS where a server is installed. It measures engines alone, not what their records mean.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{Options, Report};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{EngineKind, EngineSettings};
use hypercast_core::quantile::quantile;
use hypercast_stream::streams::{self, Record, StreamEngine, Topic};

/// An event's bytes, and the events of a call.
const EVENT: (usize, usize) = (200, 100);

/// How long each figure appends.
const APPENDING: Duration = Duration::from_secs(3);

/// Measures every engine that is there.
///
/// # Errors
/// A temporary folder that cannot be made or filled.
pub(super) fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let temp = std::env::temp_dir();
    let folder = tempfile::tempdir().map_err(Error::io(&temp))?;
    if options.wants("directory") {
        for (name, fsync) in [("a directory", true), ("a directory, without syncs", false)] {
            let dir = folder.path().join(name.replace([' ', ','], "-"));
            let settings = EngineSettings { dir, fsync, ..EngineSettings::default() };
            rates(report, name, &*streams::open(&settings)?)?;
        }
    }
    if options.wants("nats") {
        match Server::start(&folder.path().join("nats"))? {
            Some(server) => rates(report, "NATS", &*streams::open(&server.settings())?)?,
            None => report.note("NATS: nats-server is not in PATH (apt-get install nats-server)"),
        }
    }
    Ok(())
}

fn rates(report: &mut Report, name: &str, engine: &dyn StreamEngine) -> Result<()> {
    let (bytes, batch) = EVENT;
    for threads in [1, 8] {
        let topic = Topic::expert("bench", &threads.to_string());
        let start = Instant::now();
        let mut took = appended(engine, &topic, threads)?;
        let events = took.len() * batch;
        let rate = events as f64 / start.elapsed().as_secs_f64();
        let of =
            format!("engine: {name}, {threads} threads, calls of {batch} events of {bytes} bytes");
        report.add(format!("{of}: appended"), (rate, "events/s"), None);
        report.add(format!("{of}: p50"), (quantile(&mut took, 0.5), "ms"), None);
        report.add(format!("{of}: p99"), (quantile(&mut took, 0.99), "ms"), None);
        let start = Instant::now();
        let mut reader = engine.reader(&topic, 0)?;
        while reader.position() < events as u64 {
            reader.next(10_000, APPENDING)?;
        }
        let rate = events as f64 / start.elapsed().as_secs_f64();
        report.add(format!("{of}: read"), (rate, "events/s"), None);
        let start = Instant::now();
        engine.appender(&topic)?;
        let took = start.elapsed().as_secs_f64();
        report.add(
            format!("engine: {name}, opening a stream of {events} events"),
            (took, "s"),
            None,
        );
    }
    Ok(())
}

/// Appends from so many threads for a while; the milliseconds of every call.
fn appended(engine: &dyn StreamEngine, topic: &Topic, threads: u64) -> Result<Vec<f64>> {
    let appender = engine.appender(topic)?;
    let until = Instant::now() + APPENDING;
    let calls = |thread: u64| -> Result<Vec<f64>> {
        let mut took = Vec::new();
        let mut next = (thread + 1) << 40;
        while Instant::now() < until {
            let records: Vec<Record> = (next..next + EVENT.1 as u64)
                .map(|id| Record { id, payload: vec![id as u8; EVENT.0] })
                .collect();
            next += EVENT.1 as u64;
            let start = Instant::now();
            appender.append(&records)?;
            took.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(took)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..threads).map(|thread| scope.spawn(move || calls(thread))).collect();
        let mut took = Vec::new();
        for thread in threads {
            took.extend(thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(took)
    })
}

/// A NATS server that ends with the bench.
struct Server {
    process: Child,
    port: u16,
}

impl Server {
    /// None where it is not installed.
    fn start(dir: &Path) -> Result<Option<Server>> {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
        let port = free.map_err(Error::io(dir))?.port();
        let process = Command::new("nats-server")
            .args(["-js", "-a", "127.0.0.1", "-p", &port.to_string(), "-sd"])
            .arg(dir)
            .stderr(Stdio::null())
            .spawn();
        Ok(process.ok().map(|process| Server { process, port }))
    }

    fn settings(&self) -> EngineSettings {
        let nats_url = format!("nats://127.0.0.1:{}", self.port);
        EngineSettings { kind: EngineKind::Nats, nats_url, ..EngineSettings::default() }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.process.kill().and_then(|()| self.process.wait()) {
            eprintln!("nats-server: {error}; end process {} by hand", self.process.id());
        }
    }
}
