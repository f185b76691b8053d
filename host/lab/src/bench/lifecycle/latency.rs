//! The age of events when they are joined, and when a trainer learns from them.
//!
//! All windows have one length, and no impression is complete before its window ends, so the age
//! above that length is the system's own delay.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use hypercast_core::{clock::now_ms, quantile::quantile};
use hypercast_stream::{
    join::JoinedRecord,
    streams::{self, StreamEngine, Topic},
};
use serde_json::Value;

use super::{LifecycleFixture, sender::EventLoad};
use crate::{
    bench::{BenchOptions, BenchReport, temporary},
    error::{CommonErrors as _, Error, Result},
};

const RATE: f64 = 2_000.0;
const WINDOW_S: u64 = 5;

/// The delay that is allowed on top of the window, in seconds.
const ALLOWED_S: f64 = 10.0;

/// Adds the group's figures to the report.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    let mut fixture = LifecycleFixture::new(dir.path(), options.engine, |config| {
        config.join.min_window_s = WINDOW_S;
        config.join.first_window_s = WINDOW_S;
        config.join.max_window_s = WINDOW_S;
        config.publish.every_s = 5;
    })?;
    let url = fixture.begin()?;
    fixture.start("train-fm", &["train", "fm", "--follow"], "\"published\"")?;
    let engine = streams::open(&fixture.config.engine)?;
    let lasting = Duration::from_secs(options.seconds.min(60));
    let load = EventLoad { rate: RATE, batch: 50, lasting, complete: false };
    let ended = AtomicBool::new(false);
    let (sent, ages) = std::thread::scope(|scope| {
        let watching = scope.spawn(|| ages_s(&*engine, &ended));
        let sent = load.send(&url, || ());
        // The last windows must end too.
        std::thread::sleep(Duration::from_secs(WINDOW_S + ALLOWED_S as u64));
        ended.store(true, Ordering::Release);
        (sent, watching.join().expect("a reader does not panic"))
    });
    let (sent, mut ages) = (sent?, ages?);
    fixture.processes.stop()?;
    let rate = sent.events as f64 / sent.seconds;
    report.figure("events of the latencies", rate, "events/s");
    let limit_s = WINDOW_S as f64 + ALLOWED_S;
    let mut add = |name: String, age_s: f64| {
        report.versus(name, age_s, "s", "window + 10 s", limit_s);
    };
    if ages.is_empty() {
        return Err(Error::internal("nothing was joined"));
    }
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        add(format!("impression to joined example, {name}"), quantile(&mut ages, share));
    }
    // Its log has a line for every window of requests.
    let log = fixture.processes.log("train-fm");
    let text = std::fs::read_to_string(&log).map_err(Error::io(&log))?;
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let of = |line: &Value, key: &str| line["event_to_trainer_ms"][key].as_f64();
    let pairs = lines.filter_map(|line| of(&line, "p50").zip(of(&line, "p99")));
    let (mut p50_ms, p99_ms): (Vec<f64>, Vec<f64>) = pairs.unzip();
    if p50_ms.is_empty() {
        report.note("event to trainer: the trainer has not learned from 1000 requests");
        return Ok(());
    }
    let of = format!("of {} windows of 1000 requests", p50_ms.len());
    let (median_s, worst_s) =
        (quantile(&mut p50_ms, 0.5) / 1e3, p99_ms.into_iter().fold(0.0, f64::max) / 1e3);
    add(format!("newest event to trainer, p50 (median {of})"), median_s);
    add(format!("newest event to trainer, p99 (worst {of})"), worst_s);
    Ok(())
}

/// The age of each example's impressions when the example could be read.
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
