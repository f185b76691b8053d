//! The cost of publications to the requests that are served while they are applied.
//!
//! A daemon follows an FM's published weights under a constant load. Stretches with and without
//! publications alternate, and their medians count. The deltas are prepared: a trainer would run on
//! another machine.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use hypercast_config::{Config, PublishSettings};
use hypercast_core::{quantile::quantile, shutdown::Shutdown};
use hypercast_data::{
    dataset::{Dataset, timeline::Span},
    features::replay::Replay,
    import::simulate::{self, simulate},
};
use hypercast_stream::{
    publish::{Publisher, TrainingPosition},
    streams::{self, MemoryEngine, Record, StreamEngine, Topic},
};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec, trained_dir};

use super::{PATIENCE, choose_engine, folder};
use crate::{
    bench::{
        BenchFigure, BenchOptions, BenchReport,
        load::{LoadResult, MetricsSnapshot, OpenLoopClient},
        serving::{bodies, mlp, rank_url, train_both},
    },
    error::{CommonErrors as _, Error, Result},
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

/// Adds the figures.
pub fn measure(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = folder()?;
    let mut processes =
        ProcessGroup::new(dir.path().join("process-logs"), Shutdown::on_signals()?)?;
    let path = trained(dir.path(), options, &mut processes)?;
    let config = Config::read(&path)?;
    let prepared = PreparedPublications::new(&config, dir.path(), options.publications)?;
    report.add(BenchFigure::new("weights of a delta", prepared.share * 100.0, "% of the bytes"));
    let streams = streams::open(&config.engine)?;
    let to = streams.appender(&Topic::fm(FIRST_VERSION))?;
    to.append(&prepared.snapshot)?;
    register(&processes, &path)?;
    let daemon = DaemonProcess::start(&path)?;
    let client =
        OpenLoopClient::cycle(rank_url(&daemon), bodies(&config.paths.dataset, 0, false)?)?;
    client.one_by_one(200);
    let rate = 0.5e3 / quantile(&mut client.one_by_one(400), 0.5);
    let before = MetricsSnapshot::read(&daemon)?;
    let every = Duration::from_millis(options.publish_every_ms);
    let mut rounds = PublishRounds { every, ..PublishRounds::default() };
    for deltas in prepared.deltas.chunks(options.publications.div_ceil(ROUNDS)) {
        let lasting = every * deltas.len() as u32;
        rounds.quiet.push(client.send(rate, lasting));
        let stretch = std::thread::scope(|scope| {
            let publishing = scope.spawn(|| {
                for delta in deltas {
                    to.append(delta)?;
                    std::thread::sleep(every);
                }
                Result::Ok(())
            });
            let stretch = client.send(rate, lasting);
            publishing.join().expect("a publisher does not panic").map(|()| stretch)
        })?;
        rounds.busy.push(stretch);
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
    report.add(BenchFigure::new(
        "load, half of what one request at a time gives",
        rate,
        "requests/s",
    ));
    rounds.figures(report);
    let figure = BenchFigure::new("publications applied", applied(&after), "");
    report.add(figure.versus("published", all));
    let degraded = |metrics: &MetricsSnapshot| metrics.sum("hypercast_degraded_total", "");
    let degraded = degraded(&after) - degraded(&before);
    report.add(BenchFigure::new("degraded requests", degraded, ""));
    Ok(())
}

/// Simulates a world and trains both tiers; returns the path of the configuration.
fn trained(dir: &Path, options: &BenchOptions, processes: &mut ProcessGroup) -> Result<PathBuf> {
    simulate(&simulate::SimulateOptions {
        into: dir.join("data"),
        users: 300,
        items: 5_000,
        requests: 4_000,
        surfaces: 2,
        seed: 1,
    })?;
    let mut config = Config::default();
    config.fm.max_history = 64;
    config.features.history_events = 64;
    config.join.in_daemon = false;
    choose_engine(&mut config, options.engine, dir, processes)?;
    config.experts = vec![mlp(options.plugin("mlp-fusion")?)];
    let path = dir.join("hypercast.toml");
    config.write(&path)?;
    train_both(&path)?;
    Ok(path)
}

/// Registers and promotes the published FM and the expert that pins it.
fn register(processes: &ProcessGroup, config: &Path) -> Result<()> {
    let commands: [&[&str]; 4] = [
        &["register", "fm", "--published", FIRST_VERSION],
        &["promote", "fm", FIRST_VERSION],
        &["register", "expert", "mlp", "1.0.0"],
        &["promote", "expert", "mlp", "1.0.0"],
    ];
    for words in commands {
        let mut args = vec![OsStr::new("versions")];
        args.extend(words.iter().map(OsStr::new));
        args.extend([OsStr::new("--config"), config.as_os_str()]);
        processes
            .output(&args)?
            .map_err(|reason| Error::internal(format!("versions {}: {reason}", words.join(" "))))?;
    }
    Ok(())
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
        let from =
            hypercast_fm::trainer::ResumePaths { saved: &saved, work: &dir.join("learning") };
        let mut trainer = hypercast_fm::trainer::resume(from, &config.fm, &spec, config.device)?;
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
        let mut examples = std::iter::empty().chain(replayed(&dataset, config)?);
        while deltas.len() < publications {
            let batch: Vec<_> = examples
                .by_ref()
                .take(REQUESTS_PER_DELTA)
                .collect::<hypercast_data::Result<_>>()?;
            if batch.len() < REQUESTS_PER_DELTA {
                // The same requests again: they still move the weights.
                examples = std::iter::empty().chain(replayed(&dataset, config)?);
                continue;
            }
            let all: Vec<_> = batch.iter().collect();
            trainer.step(&all)?;
            let published = publisher.publish(&trainer.trained_weights(FIRST_VERSION)?, facts)?;
            share = share.max(published.raw_bytes as f64 / published.all_bytes as f64);
            deltas.push(records()?);
        }
        Ok(PreparedPublications { snapshot, deltas, share })
    }
}

/// The data set's requests as examples.
fn replayed(dataset: &Dataset, config: &Config) -> Result<Replay> {
    Ok(Replay::new(dataset, config.replay(Span::default()))?)
}

/// The stretches of load so far.
#[derive(Default)]
struct PublishRounds {
    every: Duration,
    quiet: Vec<LoadResult>,
    busy: Vec<LoadResult>,
}

impl PublishRounds {
    fn figures(&self, report: &mut BenchReport) {
        for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
            let of = |stretches: &[LoadResult]| {
                let mut each: Vec<f64> = stretches.iter().map(|s| s.answered(share)).collect();
                quantile(&mut each, 0.5)
            };
            let (busy_ms, quiet_ms) = (of(&self.busy), of(&self.quiet));
            let name =
                format!("request, {name}, with publications every {} ms", self.every.as_millis());
            report.add(BenchFigure::new(&*name, busy_ms, "ms").versus("without", quiet_ms));
            let name = format!("{name}, over without");
            report.add(BenchFigure::new(name, busy_ms / quiet_ms, "times"));
        }
        for (name, stretches) in [("without", &self.quiet), ("with", &self.busy)] {
            let sum = |of: fn(&LoadResult) -> usize| stretches.iter().map(of).sum::<usize>() as f64;
            report.add(BenchFigure::new(
                format!("requests {name} publications"),
                sum(LoadResult::requests),
                "",
            ));
            let failed = sum(|s| s.failed + s.late + s.refused_ms.len());
            report.add(BenchFigure::new(format!("of them not answered, {name}"), failed, ""));
        }
    }
}

fn count_applied(metrics: &MetricsSnapshot) -> f64 {
    metrics.sum("hypercast_publications_total", "outcome=\"applied\"")
}
