//! How old events are when they are joined, and when they are learned from.
//!
//! Windows have one length, and no impression is complete before its window ends, so that what
//! is above the window is the system's own delay.

use hypercast_core::quantile::quantile;
use std::{
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use serde_json::Value;

use super::{Setting, folder, sender::Offer};
use crate::bench::{Options, Report, Rival};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_core::clock::now_ms;
use hypercast_stream::join::JoinedRecord;
use hypercast_stream::streams::{self, StreamEngine, Topic};

const RATE: f64 = 2_000.0;
const WINDOW_S: u64 = 5;

/// What may be on top of the window, in seconds.
const MORE_S: f64 = 10.0;

/// Adds the figures.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let dir = folder()?;
    let mut setting = Setting::new(dir.path(), options.engine, |config| {
        config.join.min_window_s = WINDOW_S;
        config.join.first_window_s = WINDOW_S;
        config.join.max_window_s = WINDOW_S;
        config.publish.every_s = 5;
    })?;
    let url = setting.begin()?;
    setting.start("train-fm", &["train", "fm", "--follow"], "\"published\"")?;
    let engine = streams::open(&setting.config.engine)?;
    let lasting = Duration::from_secs(options.seconds.min(60));
    let offer = Offer { rate: RATE, batch: 50, lasting, complete: false };
    let ended = AtomicBool::new(false);
    let (sent, ages) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| ages_s(&*engine, &ended));
        let sent = offer.send(&url, || Ok(()));
        // The last windows end, too.
        std::thread::sleep(Duration::from_secs(WINDOW_S + MORE_S as u64));
        ended.store(true, Ordering::Release);
        (sent, watching.join().expect("a reader does not panic"))
    });
    let (sent, mut ages) = (sent?, ages?);
    setting.fleet.stop()?;
    let rate = sent.events as f64 / sent.seconds;
    report.add("events of the latencies", (rate, "events/s"), None);
    let limit = || Some(Rival { name: "window + 10 s".into(), value: WINDOW_S as f64 + MORE_S });
    if ages.is_empty() {
        return Err(Error::invalid("nothing was joined"));
    }
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let age = quantile(&mut ages, share);
        report.add(format!("impression to joined example, {name}"), (age, "s"), limit());
    }
    let lines = said(&dir.path().join("said/train-fm.log"))?;
    let Some(((p50, p99), count)) = lines else {
        report.note("event to trainer: the trainer has not learned from 1000 requests");
        return Ok(());
    };
    let of = format!("of {count} windows of 1000 requests");
    report.add(format!("newest event to trainer, p50 (median {of})"), (p50, "s"), limit());
    report.add(format!("newest event to trainer, p99 (worst {of})"), (p99, "s"), limit());
    Ok(())
}

/// How long after its impressions each example could be read.
fn ages_s(engine: &dyn StreamEngine, ended: &AtomicBool) -> Result<Vec<f64>> {
    let mut reader = engine.reader(&Topic::joined(), 0)?;
    let mut ages = Vec::new();
    while !ended.load(Ordering::Acquire) {
        let records = reader.next(256, Duration::from_millis(100))?;
        let now = now_ms();
        for record in records {
            if let JoinedRecord::Example(joined) = JoinedRecord::decode(&record.payload)? {
                ages.push((now - joined.example.time_ms) as f64 / 1e3);
            }
        }
    }
    Ok(ages)
}

/// What the trainer said of its latencies: the median p50 and the largest p99 in seconds, and the number of lines.
fn said(path: &Path) -> Result<Option<((f64, f64), usize)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of = |line: &Value, key: &str| line["event_to_trainer_ms"][key].as_f64();
    let pairs = lines.filter_map(|line| of(&line, "p50").zip(of(&line, "p99")));
    let (mut p50, p99): (Vec<f64>, Vec<f64>) = pairs.unzip();
    if p50.is_empty() {
        return Ok(None);
    }
    let worst = p99.into_iter().fold(0.0, f64::max);
    Ok(Some(((quantile(&mut p50, 0.5) / 1e3, worst / 1e3), p50.len())))
}
