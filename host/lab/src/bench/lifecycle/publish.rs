//! The cost of publications to the requests that are served while they are applied.
//!
//! A daemon follows an FM's published weights under a constant load. Stretches with and without
//! publications alternate, and their medians count. The deltas are prepared: a trainer would run on
//! another machine.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypercast_config::{Config, PublishSettings};
use hypercast_core::{quantile::quantile, shutdown::Shutdown};
use hypercast_data::{
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};
use hypercast_fm::{
    example::Example,
    trainer::{self, ResumePaths},
};
use hypercast_stream::{
    publish::{Publisher, TrainingPosition},
    streams::{self, MemoryEngine, Record, StreamEngine, Topic},
};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec, trained_dir};

use super::{PATIENCE, choose_engine};
use crate::{
    bench::{
        BenchOptions, BenchReport,
        load::{LoadResult, MetricsSnapshot},
        serving::{rank_client, train_both},
        temporary, world,
    },
    demo::preset::expert,
    error::Result,
    evaluate::stream::replay,
    processes::{DaemonProcess, ProcessGroup},
};

/// Stretches of each kind.
const ROUNDS: usize = 4;

/// How often it polls whether the last publications are applied.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Requests that the trainer learns from between two publications.
const REQUESTS_PER_DELTA: usize = 32;

/// The largest share of the weights in a delta.
const SHARE: f64 = 0.3;

/// Adds the group's figures to the report.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = temporary()?;
    let mut processes =
        ProcessGroup::new(dir.path().join("process-logs"), Shutdown::on_signals()?)?;
    let path = trained(dir.path(), options, &mut processes)?;
    let config = Config::read(&path)?;
    let prepared = PreparedPublications::new(&config, dir.path(), options.publications)?;
    report.figure("weights of a delta", prepared.share * 100.0, "% of the bytes");
    let streams = streams::open(&config.engine)?;
    let to = streams.appender(&Topic::fm(FIRST_VERSION))?;
    to.append(&prepared.snapshot)?;
    let commands: [&[&str]; 4] = [
        &["register", "fm", "--published", FIRST_VERSION],
        &["promote", "fm", FIRST_VERSION],
        &["register", "expert", "mlp", "1.0.0"],
        &["promote", "expert", "mlp", "1.0.0"],
    ];
    for words in commands {
        processes.accepted(words, &path)?;
    }
    let daemon = DaemonProcess::start(&path)?;
    let client = rank_client(&daemon, &config.paths.dataset, 0)?;
    let rate = 0.5e3 / client.alone_ms();
    let before = MetricsSnapshot::read(&daemon)?;
    let every = Duration::from_millis(options.publish_every_ms);
    let (mut quiet, mut busy) = (Vec::new(), Vec::new());
    for deltas in prepared.deltas.chunks(options.publications.div_ceil(ROUNDS)) {
        let lasting = every * deltas.len() as u32;
        quiet.push(client.send(rate, lasting));
        let stretch = std::thread::scope(|scope| {
            let publishing = scope.spawn(|| -> Result<()> {
                for delta in deltas {
                    to.append(delta)?;
                    std::thread::sleep(every);
                }
                Ok(())
            });
            let stretch = client.send(rate, lasting);
            publishing.join().expect("a publisher does not panic").map(|()| stretch)
        })?;
        busy.push(stretch);
    }
    let all = prepared.deltas.len() as f64;
    let start = std::time::Instant::now();
    let mut after = MetricsSnapshot::read(&daemon)?;
    let applied = |after: &MetricsSnapshot| count_applied(after) - count_applied(&before);
    while applied(&after) < all && start.elapsed() < PATIENCE {
        std::thread::sleep(POLL_INTERVAL);
        after = MetricsSnapshot::read(&daemon)?;
    }
    daemon.stop()?;
    processes.stop()?;
    report.figure("load, half of what one request at a time gives", rate, "requests/s");
    for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
        let of = |stretches: &[LoadResult]| {
            let mut each: Vec<f64> = stretches.iter().map(|s| s.answered(share)).collect();
            quantile(&mut each, 0.5)
        };
        let (busy_ms, quiet_ms) = (of(&busy), of(&quiet));
        let name = format!("request, {name}, with publications every {} ms", every.as_millis());
        report.versus(&*name, busy_ms, "ms", "without", quiet_ms);
        report.figure(format!("{name}, over without"), busy_ms / quiet_ms, "times");
    }
    for (name, stretches) in [("without", &quiet), ("with", &busy)] {
        let sum = |of: fn(&LoadResult) -> usize| stretches.iter().map(of).sum::<usize>() as f64;
        report.figure(format!("requests {name} publications"), sum(LoadResult::requests), "");
        let failed = sum(|s| s.failed + s.late + s.refused_ms.len());
        report.figure(format!("of them not answered, {name}"), failed, "");
    }
    report.versus("publications applied", applied(&after), "", "published", all);
    let degraded = |metrics: &MetricsSnapshot| metrics.sum("hypercast_degraded_total", "");
    let degraded = degraded(&after) - degraded(&before);
    report.figure("degraded requests", degraded, "");
    Ok(())
}

/// Simulates a world and trains both tiers; returns the path of the configuration.
fn trained(dir: &Path, options: &BenchOptions, processes: &mut ProcessGroup) -> Result<PathBuf> {
    simulate(&SimulateOptions { items: 5_000, requests: 4_000, ..world(dir) })?;
    let mut config = Config::default();
    config.fm.max_history = 64;
    config.features.history_events = 64;
    config.join.in_daemon = false;
    choose_engine(&mut config, options.engine, dir, processes)?;
    config.experts = vec![expert("mlp", options.plugin("mlp-fusion")?)];
    let path = dir.join("hypercast.toml");
    config.write(&path)?;
    train_both(&path)?;
    Ok(path)
}

/// The records of publications, made before they are needed.
struct PreparedPublications {
    snapshot: Vec<Record>,
    deltas: Vec<Vec<Record>>,
    /// Bytes of the largest delta over those of all weights, before compression.
    share: f64,
}

impl PreparedPublications {
    /// Continues training the FM, and publishes after every few requests.
    fn new(config: &Config, dir: &Path, publications: usize) -> Result<PreparedPublications> {
        let dataset = Dataset::open(&config.paths.dataset)?;
        let spec = dataset_spec(&dataset)?;
        let saved = trained_dir(config);
        let from = ResumePaths { saved: &saved, work: &dir.join("learning"), growths: &[] };
        let mut trainer = trainer::resume(from, &config.fm, &spec, config.device)?;
        let memory: Arc<dyn StreamEngine> = Arc::new(MemoryEngine::default());
        let topic = Topic::fm(FIRST_VERSION);
        let settings = PublishSettings {
            share: SHARE,
            snapshot_every: publications as u32 + 1,
            ..config.publish.clone()
        };
        let mut publisher =
            Publisher::open(memory.clone(), topic.clone(), settings, &dir.join("published"))?;
        let mut reader = memory.reader(&topic, 0)?;
        let mut records = || -> Result<Vec<Record>> {
            let mut records = Vec::new();
            loop {
                let read = reader.next(64, Duration::ZERO)?;
                if read.is_empty() {
                    return Ok(records);
                }
                records
                    .extend(read.into_iter().map(|read| Record { id: 0, payload: read.payload }));
            }
        };
        let facts = TrainingPosition::default();
        publisher.publish(&trainer.trained_weights(FIRST_VERSION)?, facts)?;
        let (snapshot, mut deltas, mut share) = (records()?, Vec::new(), 0.0f64);
        let examples = replay(&dataset, config, config.fm.max_history)?;
        let examples: Vec<Example> = examples.collect::<hypercast_data::Result<_>>()?;
        // The same requests again and again: they still move the weights.
        for batch in examples.chunks_exact(REQUESTS_PER_DELTA).cycle().take(publications) {
            trainer.step(&batch.iter().collect::<Vec<_>>())?;
            let published = publisher.publish(&trainer.trained_weights(FIRST_VERSION)?, facts)?;
            share = share.max(published.raw_bytes as f64 / published.all_bytes as f64);
            deltas.push(records()?);
        }
        Ok(PreparedPublications { snapshot, deltas, share })
    }
}

fn count_applied(metrics: &MetricsSnapshot) -> f64 {
    metrics.sum("hypercast_publications_total", "outcome=\"applied\"")
}
