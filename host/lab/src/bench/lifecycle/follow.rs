//! How many requests a second an FM learns that follows a stream, and where its trainer's time
//! goes.
//!
//! The stream is there before the trainer begins, so that it never waits for a record. It runs in
//! this process: nothing else is to do.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use hypercast_config::{Config, FmGateSettings};
use hypercast_core::{clock::now_ms, hash::mix64, quantile::quantile, shutdown::Shutdown};
use hypercast_data::{
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};
use hypercast_fm::runtime::BurnRuntime;
use hypercast_store::Store;
use hypercast_stream::{
    join::{JoinedExample, JoinedRecord},
    streams::{self, Record, StreamEngine, Topic},
};
use hypercast_train::{
    ServiceContext,
    fm::FIRST_VERSION,
    follow_fm::{FmFollower, FmStageTimes, FollowFmOptions, FollowFmReport, work_dir},
};
use serde_json::Value;

use super::choose_engine;
use crate::{
    bench::{BenchOptions, BenchReport, temporary, world},
    error::{CommonErrors as _, Error, Result},
    evaluate::stream::replay,
    processes::ProcessGroup,
};

/// Events of history of each request.
const HISTORY: usize = 128;

/// Requests of the stream. The simulated world has more, whose histories are shorter.
const REQUESTS: usize = 12_000;

/// The most rows that the trainer's store has at first.
const MAX_ROWS: usize = 500_000;

/// Deltas between two snapshots.
const SNAPSHOT_EVERY: u32 = 4;

/// Adds the group's figures to the report.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    simulate(&SimulateOptions {
        users: 100,
        items: 20_000,
        requests: 30 * 100 + REQUESTS,
        ..world(dir.path())
    })?;
    let mut processes =
        ProcessGroup::new(dir.path().join("process-logs"), Shutdown::on_signals()?)?;
    let mut config = Config::default();
    config.fm.max_history = HISTORY;
    config.fm.save_every_requests = 2_000;
    config.publish.every_s = options.publish_every_ms.div_ceil(1000);
    config.publish.snapshot_every = SNAPSHOT_EVERY;
    choose_engine(&mut config, options.engine, dir.path(), &mut processes)?;
    let path = dir.path().join("hypercast.toml");
    config.write(&path)?;
    let mut config = Config::read(&path)?;
    let dataset = Dataset::open(&config.paths.dataset)?;
    let engine = streams::open(&config.engine)?;
    let record_bytes = fill(&dataset, &config, &*engine)?;

    // A gate that compares all and holds nothing, once there is something to compare with.
    let gate = FmGateSettings { rows: 0, ..config.fm_gate.clone() };
    let begun = Config { fm_gate: gate, ..config.clone() };
    let (mut out, stop) = (Vec::new(), Shutdown::default());
    let options_of_trainer = FollowFmOptions {
        version: FIRST_VERSION.into(),
        from: None,
        metrics: None,
        until_end: true,
    };
    let open = |config: &Config| {
        let context = ServiceContext { dataset: &dataset, config, engine: engine.clone() };
        FmFollower::open(context, &options_of_trainer, Arc::new(BurnRuntime), &stop)
    };
    let mut first = open(&begun)?;
    first.step(Duration::ZERO, &mut out)?;
    first.finish(&mut out)?;
    let rows = options.rows.min(MAX_ROWS);
    fill_store(&work_dir(&config, FIRST_VERSION).join("saved/trainer/store"), rows)?;
    (config.fm_gate.max_ne_increase, config.fm_gate.max_tae_drift) = (1e9, 1e9);
    config.fm_gate.max_feature_drift = 1e9;
    let mut follower = open(&config)?;
    out.clear();

    let (start, lasting) = (Instant::now(), Duration::from_secs(options.seconds));
    let mut turns_ms = Vec::new();
    while start.elapsed() < lasting {
        let turn = Instant::now();
        if !follower.step(Duration::ZERO, &mut out)? {
            break;
        }
        turns_ms.push(turn.elapsed().as_secs_f64() * 1e3);
    }
    let (took, learned) = (start.elapsed(), follower.report());
    follower.finish(&mut out)?;
    processes.stop()?;
    report.figure("rows of the store, at first", rows as f64, "");
    report.figure("bytes of a joined record", record_bytes, "bytes");
    LearnedStream { took, learned, turns_ms, lines: out }.add_to(report)
}

/// What a trainer did with the stream.
struct LearnedStream {
    took: Duration,
    learned: FollowFmReport,
    /// Of each turn of its loop.
    turns_ms: Vec<f64>,
    /// What it said, as JSON.
    lines: Vec<u8>,
}

impl LearnedStream {
    fn add_to(self, report: &mut BenchReport) -> Result<()> {
        let LearnedStream { took, learned, mut turns_ms, lines } = self;
        let per_s = learned.requests as f64 / took.as_secs_f64();
        report.figure(format!("requests with {HISTORY} events learned"), per_s, "requests/s");
        report.figure("events of their histories", per_s * HISTORY as f64, "events/s");
        let FmStageTimes { read, step, save, gate, publish } = learned.times;
        let rest = took.saturating_sub(read + step + save + gate + publish);
        for (name, time) in [
            ("reading and decoding", read),
            ("steps", step),
            ("saves", save),
            ("the gate", gate),
            ("taking what is published", publish),
            ("the rest", rest),
        ] {
            let share = time.as_secs_f64() / took.as_secs_f64() * 100.0;
            report.figure(format!("of the trainer's time, {name}"), share, "%");
        }
        report.figure("publications", learned.published as f64, "");
        for (name, key) in [("a publication", "took_ms"), ("its pause of learning", "paused_ms")] {
            let mut times_ms = of_publications(&lines, key)?;
            for (share, which) in [(0.5, "p50"), (1.0, "the longest")] {
                if !times_ms.is_empty() {
                    report.figure(format!("{name}, {which}"), quantile(&mut times_ms, share), "ms");
                }
            }
        }
        for (share, which) in [(0.5, "p50"), (0.99, "p99"), (1.0, "the longest")] {
            let turn_ms = quantile(&mut turns_ms, share);
            report.figure(format!("a turn of the trainer, {which}"), turn_ms, "ms");
        }
        Ok(())
    }
}

/// Fills `joined` with the requests of a data set whose histories are long enough; gives the mean
/// bytes of a record.
fn fill(dataset: &Dataset, config: &Config, engine: &dyn StreamEngine) -> Result<f64> {
    let joined = engine.appender(&Topic::joined())?;
    let (mut batch, mut bytes, mut requests) = (Vec::new(), 0, 0);
    for example in replay(dataset, config, HISTORY)? {
        let example = example?;
        if example.history.len() < HISTORY {
            continue;
        }
        let record = JoinedExample { example, ingested_ms: now_ms(), ranked: Vec::new() };
        let payload = postcard::to_stdvec(&JoinedRecord::Example(record))
            .map_err(|error| Error::internal(format!("an example cannot be encoded: {error}")))?;
        bytes += payload.len();
        requests += 1;
        batch.push(Record { id: 0, payload });
        if batch.len() == 256 {
            joined.append(&std::mem::take(&mut batch))?;
        }
    }
    joined.append(&batch)?;
    if requests < REQUESTS / 2 {
        return Err(Error::internal(format!("{requests} requests have {HISTORY} events")));
    }
    Ok(bytes as f64 / requests as f64)
}

/// Adds rows that nothing learns, as of a long past, to the store of a saved trainer.
fn fill_store(dir: &Path, rows: usize) -> Result<()> {
    let mut store = Store::open(dir)?;
    let ids: Vec<u64> = (0..rows as u64).map(mix64).collect();
    let mut values = vec![0.0; (1 << 12) * store.dim()];
    for ids in ids.chunks(1 << 12) {
        let dim = store.dim();
        store.gather_or_init(ids, &mut values[..ids.len() * dim])?;
    }
    store.checkpoint()?;
    Ok(())
}

/// A number of each publication, by a trainer's lines.
fn of_publications(lines: &[u8], key: &str) -> Result<Vec<f64>> {
    let mut numbers = Vec::new();
    for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line)
            .map_err(|error| Error::internal(format!("a trainer's line is no JSON: {error}")))?;
        numbers.extend(line[key].as_f64().filter(|_| line["kind"] == "published"));
    }
    Ok(numbers)
}
