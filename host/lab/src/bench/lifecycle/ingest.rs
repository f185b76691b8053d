//! Ingest beside the joiner at a constant rate: how long an acknowledgement takes,
//! whether memory stays, and whether all that was acknowledged is in the stream, once.

use hypercast_core::quantile::quantile;
use std::{
    fs::File,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use super::{
    PATIENCE, Setting, folder,
    sender::{Acknowledged, Offer, place},
};
use crate::bench::{Options, Report, Rival};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_stream::events::{EventKind, EventRecord};
use hypercast_stream::streams::{self, StreamEngine, Topic};

const RATE: f64 = 20_000.0;
const BATCH: u64 = 500;

/// How long the raw loop runs.
const RAW: Duration = Duration::from_secs(5);

/// Adds the figures.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let dir = folder()?;
    let offer = Offer {
        rate: RATE,
        batch: BATCH,
        lasting: Duration::from_secs(options.seconds),
        complete: true,
    };
    let mut setting = Setting::new(dir.path(), options.engine, |config| {
        // EventKind is kept for a while has its full size before memory is looked at for the first time.
        config.join.correction_s = (options.seconds / 15).clamp(1, 20);
        config.engine.remembered_ids = (RATE as u64 * options.seconds / 15).min(500_000) as usize;
        // A tick is a record, too: here the stream holds what was sent and nothing else.
        config.join.tick_ms = 0;
    })?;
    let url = setting.begin()?;
    let mut early = Vec::new();
    let sent = offer.send(&url, || {
        std::thread::sleep(offer.lasting / 10);
        early = setting.fleet.memory_mib();
        Ok(())
    })?;
    let late = setting.fleet.memory_mib();
    let engine = streams::open(&setting.config.engine)?;
    let behind = drain(&*engine, sent.impressions_joined())?;
    setting.fleet.stop()?;
    let kept = Kept::read(&*engine, &sent)?;
    let (raw_rate, mut raw_ms) = raw(dir.path(), kept.bytes / sent.events.max(1) * BATCH)?;
    figures(sent, &mut raw_ms, report);
    report.add("the raw loop's rate", (raw_rate, "events/s"), None);
    for ((name, then), (_, now)) in early.into_iter().zip(late) {
        let then = Rival { name: "after a tenth of the time".into(), value: then };
        report.add(format!("{name}: memory at the end"), (now, "MiB"), Some(then));
    }
    report.add("acknowledged events that are not in the stream", (kept.lost as f64, ""), None);
    report.add("events that are there twice", (kept.doubled as f64, ""), None);
    report.add("the joiner had all joined after the last one by", (behind, "s"), None);
    Ok(())
}

fn figures(mut sent: Acknowledged, raw_ms: &mut [f64], report: &mut Report) {
    let offered = Rival { name: "offered".into(), value: RATE };
    let rate = sent.events as f64 / sent.seconds;
    let over = sent.seconds;
    report.add(format!("ingest over {over:.0} s"), (rate, "events/s"), Some(offered));
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let raw = Rival { name: "raw append + fdatasync".into(), value: quantile(raw_ms, share) };
        let ours = quantile(&mut sent.ack_ms, share);
        report.add(format!("acknowledgement of {BATCH} events, {name}"), (ours, "ms"), Some(raw));
    }
    report.add("bodies that were sent again", (sent.again as f64, ""), None);
}

impl Acknowledged {
    /// Impressions whose actions were told, too, and are therefore joined.
    fn impressions_joined(&self) -> u64 {
        self.events - self.impressions
    }
}

/// Waits until the joiner has so many outcomes; the seconds that took.
fn drain(engine: &dyn StreamEngine, outcomes: u64) -> Result<f64> {
    let start = Instant::now();
    while engine.span(&Topic::outcomes())?.end < outcomes {
        if start.elapsed() > PATIENCE {
            let end = engine.span(&Topic::outcomes())?.end;
            return Err(Error::invalid(format!("{end} of {outcomes} outcomes after {PATIENCE:?}")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(start.elapsed().as_secs_f64())
}

/// EventKind the stream holds.
struct Kept {
    bytes: u64,
    lost: u64,
    doubled: u64,
}

impl Kept {
    fn read(engine: &dyn StreamEngine, sent: &Acknowledged) -> Result<Kept> {
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
                    other => return Err(Error::invalid(format!("nobody told of {other:?}"))),
                };
                let seen = at.and_then(|at| seen[kind].get_mut(at as usize));
                let seen = seen.ok_or_else(|| Error::invalid("an event that nobody told"))?;
                match std::mem::replace(seen, true) {
                    true => doubled += 1,
                    false => found += 1,
                }
            }
        }
        Ok(Kept { bytes, lost: sent.events - found, doubled })
    }
}

/// Appends of as many bytes as a body's records have to a file, each with an fdatasync: events a second, and milliseconds of each.
fn raw(dir: &Path, bytes: u64) -> Result<(f64, Vec<f64>)> {
    let path = dir.join("raw");
    let mut file = File::create(&path).map_err(Error::io(&path))?;
    let (body, start, mut took) = (vec![7; bytes as usize], Instant::now(), Vec::new());
    while start.elapsed() < RAW {
        let begin = Instant::now();
        file.write_all(&body).and_then(|()| file.sync_data()).map_err(Error::io(&path))?;
        took.push(begin.elapsed().as_secs_f64() * 1e3);
    }
    Ok((took.len() as f64 * BATCH as f64 / start.elapsed().as_secs_f64(), took))
}
