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

/// Adds the figures.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    let load = EventLoad {
        rate: RATE,
        batch: BATCH,
        lasting: Duration::from_secs(options.seconds),
        complete: true,
    };
    let mut fixture = LifecycleFixture::new(dir.path(), options.engine, |config| {
        // EventKind is retained for a while reaches its full size before memory is first measured.
        config.join.correction_s = (options.seconds / 15).clamp(1, 20);
        config.engine.remembered_ids = (RATE as u64 * options.seconds / 15).min(500_000) as usize;
        // A tick is a record too; here the stream holds only what was sent.
        config.join.tick_ms = 0;
    })?;
    let url = fixture.begin()?;
    let mut early = Vec::new();
    let sent = load.send(&url, || {
        std::thread::sleep(load.lasting / 10);
        early = fixture.processes.memory_mib();
        Ok(())
    })?;
    let late = fixture.processes.memory_mib();
    let engine = streams::open(&fixture.config.engine)?;
    let behind = drain(&*engine, sent.events - sent.impressions)?;
    fixture.processes.stop()?;
    let contents = StreamContents::read(&*engine, &sent)?;
    let bytes = contents.bytes / sent.events.max(1) * BATCH;
    let mut raw = RawAppends::measure(dir.path(), bytes)?;
    figures(sent, &mut raw.calls_ms, report);
    report.figure("the raw loop's rate", raw.events_per_s, "events/s");
    for ((name, then), (_, now)) in early.into_iter().zip(late) {
        report.versus(
            format!("{name}: memory at the end"),
            now,
            "MiB",
            "after a tenth of the time",
            then,
        );
    }
    report.figure("acknowledged events that are not in the stream", contents.lost as f64, "");
    report.figure("events that are there twice", contents.doubled as f64, "");
    report.figure("the joiner had all joined after the last one by", behind, "s");
    Ok(())
}

fn figures(mut sent: EventLoadResult, raw_ms: &mut [f64], report: &mut BenchReport) {
    let rate = sent.events as f64 / sent.seconds;
    report.versus(format!("ingest over {:.0} s", sent.seconds), rate, "events/s", "offered", RATE);
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let name = format!("acknowledgement of {BATCH} events, {name}");
        report.versus(
            name,
            quantile(&mut sent.ack_ms, share),
            "ms",
            "raw append + fdatasync",
            quantile(raw_ms, share),
        );
    }
    report.figure("bodies that were sent again", sent.retries as f64, "");
}

/// Waits until the joiner has written so many outcomes; returns the seconds.
fn drain(engine: &dyn StreamEngine, outcomes: u64) -> Result<f64> {
    let start = Instant::now();
    while engine.span(&Topic::outcomes())?.end < outcomes {
        if start.elapsed() > PATIENCE {
            let end = engine.span(&Topic::outcomes())?.end;
            return Err(Error::internal(format!(
                "{end} of {outcomes} outcomes after {PATIENCE:?}"
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(start.elapsed().as_secs_f64())
}

/// EventKind the stream of events contains.
struct StreamContents {
    bytes: u64,
    lost: u64,
    doubled: u64,
}

impl StreamContents {
    fn read(engine: &dyn StreamEngine, sent: &EventLoadResult) -> Result<StreamContents> {
        let mut seen =
            [vec![false; sent.impressions as usize], vec![false; sent.impressions as usize]];
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
                let seen = seen.ok_or_else(|| {
                    Error::internal("the stream contains an event that was not sent")
                })?;
                if std::mem::replace(seen, true) {
                    doubled += 1;
                } else {
                    found += 1;
                }
            }
        }
        Ok(StreamContents { bytes, lost: sent.events - found, doubled })
    }
}

/// Rate and latency of a loop that appends to a file and waits for the disk each time.
struct RawAppends {
    events_per_s: f64,
    calls_ms: Vec<f64>,
}

impl RawAppends {
    /// Appends of `bytes`, as many as the records of a body have.
    fn measure(dir: &Path, bytes: u64) -> Result<RawAppends> {
        let path = dir.join("raw");
        let mut file = File::create(&path).map_err(Error::io(&path))?;
        let (body, start, mut calls_ms) = (vec![7; bytes as usize], Instant::now(), Vec::new());
        while start.elapsed() < RAW {
            let begin = Instant::now();
            file.write_all(&body).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
            calls_ms.push(begin.elapsed().as_secs_f64() * 1e3);
        }
        let events = calls_ms.len() as f64 * BATCH as f64;
        Ok(RawAppends { events_per_s: events / start.elapsed().as_secs_f64(), calls_ms })
    }
}
