//! Ingest beside the joiner at a constant rate: the latency of acknowledgements, the memory, and
//! whether every acknowledged event is in the stream exactly once.

use std::{
    fs::File,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use hypercast_core::quantile::quantile;
use hypercast_stream::{
    events::{EventKind, EventRecord},
    streams::{self, StreamEngine, Topic},
};

use super::{
    LifecycleFixture, PATIENCE,
    sender::{EventLoad, EventLoadResult, place},
};
use crate::{
    bench::{BenchOptions, BenchReport, temporary},
    error::{CommonErrors as _, Error, Result},
};

const RATE: f64 = 20_000.0;
const BATCH: u64 = 500;

/// How long a raw append loop runs for comparison.
const RAW: Duration = Duration::from_secs(5);

/// Adds the group's figures to the report.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    let lasting = Duration::from_secs(options.seconds);
    let load = EventLoad { rate: RATE, batch: BATCH, lasting, complete: true };
    let mut fixture = LifecycleFixture::new(dir.path(), options.engine, |config| {
        // What is retained for a while reaches its full size before memory is first measured.
        config.join.correction_s = (options.seconds / 15).clamp(1, 20);
        config.engine.remembered_ids = (RATE as u64 * options.seconds / 15).min(500_000) as usize;
        // A tick is a record too; here the stream holds only what was sent.
        config.join.tick_ms = 0;
    })?;
    let url = fixture.begin()?;
    let mut early = Vec::new();
    let mut sent = load.send(&url, || {
        std::thread::sleep(lasting / 10);
        early = fixture.processes.memory_mib();
    })?;
    let late = fixture.processes.memory_mib();
    let engine = streams::open(&fixture.config.engine)?;
    let behind = drain(&*engine, sent.events - sent.impressions)?;
    fixture.processes.stop()?;
    let bytes = check_contents(&*engine, &sent, report)?;
    let mut raw_ms = raw_appends(dir.path(), bytes / sent.events.max(1) * BATCH, report)?;
    let rate = sent.events as f64 / sent.seconds;
    report.versus(format!("ingest over {:.0} s", sent.seconds), rate, "events/s", "offered", RATE);
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let [ours, raw] = [&mut sent.ack_ms, &mut raw_ms].map(|ms| quantile(ms, share));
        let name = format!("acknowledgement of {BATCH} events, {name}");
        report.versus(name, ours, "ms", "raw append + fdatasync", raw);
    }
    report.figure("bodies that were sent again", sent.retries as f64, "");
    for ((name, then), (_, now)) in early.into_iter().zip(late) {
        let name = format!("{name}: memory at the end");
        report.versus(name, now, "MiB", "after a tenth of the time", then);
    }
    report.figure("the joiner had all joined after the last one by", behind, "s");
    Ok(())
}

/// Waits until the joiner has written so many outcomes; returns the seconds.
fn drain(engine: &dyn StreamEngine, outcomes: u64) -> Result<f64> {
    let start = Instant::now();
    while engine.span(&Topic::outcomes())?.end < outcomes {
        if start.elapsed() > PATIENCE {
            let end = engine.span(&Topic::outcomes())?.end;
            let reason = format!("{end} of {outcomes} outcomes after {PATIENCE:?}");
            return Err(Error::internal(reason));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(start.elapsed().as_secs_f64())
}

/// Adds how many events the stream lacks and has twice; returns its bytes.
fn check_contents(
    engine: &dyn StreamEngine,
    sent: &EventLoadResult,
    report: &mut BenchReport,
) -> Result<u64> {
    let mut seen = [vec![false; sent.impressions as usize], vec![false; sent.impressions as usize]];
    let (mut bytes, mut found, mut doubled) = (0, 0, 0);
    let mut reader = engine.reader(&Topic::events(), 0)?;
    loop {
        let records = reader.next(8192, Duration::from_millis(500))?;
        if records.is_empty() {
            break;
        }
        for record in records {
            bytes += record.payload.len() as u64;
            let (kind, at) = match EventRecord::decode(&record.payload)?.kind {
                EventKind::Impression(shown) => (0, place(shown.request, shown.item)),
                EventKind::Action(reaction) => (1, place(reaction.request, reaction.item)),
                other => return Err(Error::internal(format!("the stream contains {other:?}"))),
            };
            let seen = at.and_then(|at| seen[kind].get_mut(at as usize));
            let seen = seen
                .ok_or_else(|| Error::internal("the stream contains an event that was not sent"))?;
            if std::mem::replace(seen, true) {
                doubled += 1;
            } else {
                found += 1;
            }
        }
    }
    let lost = (sent.events - found) as f64;
    report.figure("acknowledged events that are not in the stream", lost, "");
    report.figure("events that are there twice", f64::from(doubled), "");
    Ok(bytes)
}

/// Adds the rate of a loop that appends `bytes` to a file, as many as the records of a body have,
/// and waits for the disk each time; returns the milliseconds of each.
fn raw_appends(dir: &Path, bytes: u64, report: &mut BenchReport) -> Result<Vec<f64>> {
    let path = dir.join("raw");
    let mut file = File::create(&path).map_err(Error::io(&path))?;
    let (body, start, mut calls_ms) = (vec![7; bytes as usize], Instant::now(), Vec::new());
    while start.elapsed() < RAW {
        let begin = Instant::now();
        file.write_all(&body).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
        calls_ms.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    let events = calls_ms.len() as f64 * BATCH as f64;
    report.figure("the raw loop's rate", events / start.elapsed().as_secs_f64(), "events/s");
    Ok(calls_ms)
}
