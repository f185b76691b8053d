//! The age of events when they are joined, when a trainer learns from them, and when weights that
//! have learned from them are published, with and without the gate.
//!
//! All windows have one length, and no impression is complete before its window ends, so the age
//! above that length is the system's own delay.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hypercast_config::Config;
use hypercast_core::{clock::now_ms, quantile::quantile};
use hypercast_stream::{
    join::JoinedRecord,
    publish::PublicationFollower,
    streams::{self, StreamEngine, Topic},
};
use hypercast_train::fm::FIRST_VERSION;
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

/// The fewest publications that the gate compares for its cost to be told.
const MIN_COMPARED: usize = 5;

/// How long readers wait before they look whether the load has ended.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The ages of one run.
struct LatencyRun {
    events_per_s: f64,
    /// Of each example's impressions when it could be read, in seconds.
    joined_s: Vec<f64>,
    /// The same when weights that had learned from it could be read, in seconds.
    published_s: Vec<f64>,
    /// Quantiles of each of the trainer's windows, in milliseconds.
    trainer_p50_ms: Vec<f64>,
    trainer_p99_ms: Vec<f64>,
    gate: GateCounts,
}

/// What the gate decided in a run.
#[derive(Default)]
struct GateCounts {
    /// Decisions on a comparison with what serves.
    compared: usize,
    /// Publications that were held, whose examples waited for a later one.
    held: usize,
}

/// An example that was read from the stream.
struct SeenExample {
    position: u64,
    time_ms: i64,
    seen_ms: i64,
}

/// A publication that was read.
struct SeenPublication {
    trained_position: u64,
    seen_ms: i64,
}

/// Adds the group's figures to the report.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let mut gated = LatencyRun::measure(options, Config::default().fm_gate.rows)?;
    let mut ungated = LatencyRun::measure(options, 0)?;
    report.figure("events of the latencies", gated.events_per_s, "events/s");
    let limit_s = WINDOW_S as f64 + ALLOWED_S;
    let mut add = |name: String, age_s: f64| {
        report.versus(name, age_s, "s", "window + 10 s", limit_s);
    };
    if gated.joined_s.is_empty() {
        return Err(Error::internal("nothing was joined"));
    }
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let age_s = quantile(&mut gated.joined_s, share);
        add(format!("impression to joined example, {name}"), age_s);
    }
    if gated.trainer_p50_ms.is_empty() {
        report.note("event to trainer: the trainer has not learned from 1000 requests");
        return Ok(());
    }
    let of = format!("of {} windows of 1000 requests", gated.trainer_p50_ms.len());
    let median_s = quantile(&mut gated.trainer_p50_ms, 0.5) / 1e3;
    let worst_s = gated.trainer_p99_ms.iter().copied().fold(0.0, f64::max) / 1e3;
    add(format!("newest event to trainer, p50 (median {of})"), median_s);
    add(format!("newest event to trainer, p99 (worst {of})"), worst_s);
    if gated.published_s.is_empty() || ungated.published_s.is_empty() {
        report.note("impression to published weights: nothing was published after the first time");
        return Ok(());
    }
    let GateCounts { compared, held } = gated.gate;
    if compared < MIN_COMPARED {
        report.note(format!(
            "impression to published weights: the gate compared {compared} publications with what \
             serves, too few for its cost; measure for longer"
        ));
        return Ok(());
    }
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let [with_s, without_s] =
            [&mut gated, &mut ungated].map(|run| quantile(&mut run.published_s, share));
        let gate = format!("with the gate ({compared} compared, {held} held)");
        let name = format!("impression to published weights, {name}, {gate}");
        report.versus(name, with_s, "s", "without", without_s);
    }
    Ok(())
}

impl LatencyRun {
    /// Runs the processes under a load, with so many rows of the gate.
    fn measure(options: &BenchOptions, gate_rows: usize) -> Result<LatencyRun> {
        let dir = temporary()?;
        let mut fixture = LifecycleFixture::new(dir.path(), options.engine, |config| {
            config.join.min_window_s = WINDOW_S;
            config.join.first_window_s = WINDOW_S;
            config.join.max_window_s = WINDOW_S;
            config.publish.every_s = 5;
            config.fm_gate.rows = gate_rows;
        })?;
        let url = fixture.begin()?;
        fixture.start("train-fm", &["train", "fm", "--follow"], "\"published\"")?;
        let engine = streams::open(&fixture.config.engine)?;
        let lasting = Duration::from_secs(options.seconds.min(60));
        let load = EventLoad { rate: RATE, batch: 50, lasting, complete: false };
        let ended = AtomicBool::new(false);
        let (sent, examples, publications) = std::thread::scope(|scope| {
            let examples = scope.spawn(|| examples(&*engine, &ended));
            let publications = scope.spawn(|| publications(engine.clone(), &ended));
            let sent = load.send(&url, || ());
            // The last windows must end too.
            std::thread::sleep(Duration::from_secs(WINDOW_S + ALLOWED_S as u64));
            ended.store(true, Ordering::Release);
            let examples = examples.join().expect("a reader does not panic");
            (sent, examples, publications.join().expect("a follower does not panic"))
        });
        let (sent, examples, publications) = (sent?, examples?, publications?);
        fixture.processes.stop()?;
        let age_s = |from_ms: i64, to_ms: i64| (to_ms - from_ms) as f64 / 1e3;
        let published = |example: &SeenExample| {
            let mut later = publications.iter();
            let with = later.find(|seen| seen.trained_position > example.position)?;
            Some(age_s(example.time_ms, with.seen_ms))
        };
        let mut run = LatencyRun {
            events_per_s: sent.events as f64 / sent.seconds,
            joined_s: examples.iter().map(|own| age_s(own.time_ms, own.seen_ms)).collect(),
            published_s: examples.iter().filter_map(published).collect(),
            trainer_p50_ms: Vec::new(),
            trainer_p99_ms: Vec::new(),
            gate: GateCounts::default(),
        };
        // Its log has a line for every window of requests.
        let log = fixture.processes.log("train-fm");
        let text = std::fs::read_to_string(&log).map_err(Error::io(&log))?;
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let lines: Vec<Value> = lines.collect();
        let of = |line: &Value, key: &str| line["event_to_trainer_ms"][key].as_f64();
        let pairs = lines.iter().filter_map(|line| of(line, "p50").zip(of(line, "p99")));
        (run.trainer_p50_ms, run.trainer_p99_ms) = pairs.unzip();
        run.gate = GateCounts::of(&lines);
        Ok(run)
    }
}

impl GateCounts {
    /// Those in the lines of a trainer.
    fn of(lines: &[Value]) -> GateCounts {
        let is_compared = |line: &&Value| {
            let mut slices = line["evaluation"].as_array().into_iter().flatten();
            slices.any(|slice| slice["serving_ne"].is_number())
        };
        GateCounts {
            compared: lines.iter().filter(is_compared).count(),
            held: lines.iter().filter(|line| line["kind"] == "held").count(),
        }
    }
}

/// The examples that come until the load has ended.
fn examples(engine: &dyn StreamEngine, ended: &AtomicBool) -> Result<Vec<SeenExample>> {
    let mut reader = engine.reader(&Topic::joined(), 0)?;
    let mut seen = Vec::new();
    while !ended.load(Ordering::Acquire) {
        let records = reader.next(256, LOOK_EVERY)?;
        let seen_ms = now_ms();
        for record in records {
            if let JoinedRecord::Example(joined) = JoinedRecord::decode(&record.payload)? {
                let time_ms = joined.example.time_ms;
                seen.push(SeenExample { position: record.position, time_ms, seen_ms });
            }
        }
    }
    Ok(seen)
}

/// The publications that come until the load has ended.
fn publications(engine: Arc<dyn StreamEngine>, ended: &AtomicBool) -> Result<Vec<SeenPublication>> {
    let mut follower = PublicationFollower::open(engine, Topic::fm(FIRST_VERSION))?;
    let mut seen = Vec::new();
    while !ended.load(Ordering::Acquire) {
        if let Some(publication) = follower.next(LOOK_EVERY)? {
            let trained_position = publication.header.trained_position;
            seen.push(SeenPublication { trained_position, seen_ms: now_ms() });
        }
    }
    Ok(seen)
}
