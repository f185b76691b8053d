//! Appends to streams and reads of them: a directory with and without fsync, and NATS where a
//! server is installed. It measures engines, not what their records mean.

use std::time::{Duration, Instant};

use hypercast_config::{EngineKind, EngineSettings};
use hypercast_core::{quantile::quantile, shutdown::Shutdown};
use hypercast_stream::streams::{self, Record, StreamEngine, Topic};

use super::{BenchOptions, BenchReport, temporary};
use crate::{error::Result, processes::ProcessGroup};

const EVENT_BYTES: usize = 200;

/// Events per call.
const BATCH: usize = 100;

/// How long each figure appends.
const DURATION: Duration = Duration::from_secs(3);

/// Measures a directory with and without fsync.
///
/// # Errors
/// A temporary folder that cannot be made or filled.
pub(super) fn directory(_: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let folder = temporary()?;
    for (name, fsync) in [("a directory", true), ("a directory, without syncs", false)] {
        let dir = folder.path().join(format!("fsync-{fsync}"));
        let settings = EngineSettings { dir, fsync, ..EngineSettings::default() };
        rates(report, name, &*streams::open(&settings)?)?;
    }
    Ok(())
}

/// Measures NATS if it is installed.
///
/// # Errors
/// A server that fails after its start.
pub(super) fn nats(_: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let folder = temporary()?;
    let mut processes = ProcessGroup::new(folder.path().join("logs"), Shutdown::on_signals()?)?;
    match processes.start_nats(&folder.path().join("nats")) {
        Ok(nats_url) => {
            let kind = EngineKind::Nats;
            let nats_url = nats_url.into();
            let settings = EngineSettings { kind, nats_url, ..EngineSettings::default() };
            rates(report, "NATS", &*streams::open(&settings)?)
        }
        Err(error) => {
            report.note(format!("NATS: {error} (apt-get install nats-server)"));
            Ok(())
        }
    }
}

fn rates(report: &mut BenchReport, name: &str, engine: &dyn StreamEngine) -> Result<()> {
    for threads in [1, 8] {
        let topic = Topic::expert("bench", &threads.to_string());
        let start = Instant::now();
        let mut calls_ms = appended(engine, &topic, threads)?;
        let events = calls_ms.len() * BATCH;
        let appended = events as f64 / start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut reader = engine.reader(&topic, 0)?;
        while reader.position() < events as u64 {
            reader.next(10_000, DURATION)?;
        }
        let read = events as f64 / start.elapsed().as_secs_f64();
        let start = Instant::now();
        engine.appender(&topic)?;
        let opening_s = start.elapsed().as_secs_f64();
        let size = format!("calls of {BATCH} events of {EVENT_BYTES} bytes");
        let mut add = |what: &str, value, unit| {
            let name = format!("engine: {name}, {threads} threads, {size}: {what}");
            report.figure(name, value, unit);
        };
        add("appended", appended, "events/s");
        add("p50", quantile(&mut calls_ms, 0.5), "ms");
        add("p99", quantile(&mut calls_ms, 0.99), "ms");
        add("read", read, "events/s");
        let name = format!("engine: {name}, {threads} threads, opening the stream again");
        report.figure(name, opening_s, "s");
    }
    Ok(())
}

/// Appends from several threads for a while; the milliseconds of every call.
fn appended(engine: &dyn StreamEngine, topic: &Topic, threads: u64) -> Result<Vec<f64>> {
    let appender = engine.appender(topic)?;
    let until = Instant::now() + DURATION;
    let calls = |thread: u64| -> Result<Vec<f64>> {
        let mut took = Vec::new();
        let mut next = (thread + 1) << 40;
        while Instant::now() < until {
            let records: Vec<Record> = (next..next + BATCH as u64)
                .map(|id| Record { id, payload: vec![id as u8; EVENT_BYTES] })
                .collect();
            next += BATCH as u64;
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
