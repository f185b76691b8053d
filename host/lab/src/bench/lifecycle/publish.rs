//! What publications cost the requests that are served while they are applied.
//!
//! A daemon follows an FM's published weights under a constant load. Stretches
//! with and without publications alternate, so that what else the machine does meets both alike, and their medians
//! count. The deltas are made beforehand: the trainer is elsewhere, and costs the daemon's machine nothing.

use hypercast_core::quantile::quantile;
use std::{ffi::OsStr, path::Path, sync::Arc, time::Duration};

use super::{PATIENCE, folder, keep_streams};
use crate::bench::{
    Options, Report, Rival,
    load::{Caller, Stretch},
    serving::{World, mlp, rank_url, train},
};
use crate::demo::{daemon::Daemon, streaming::processes::Fleet};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, PublishSettings};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::dataset::{Dataset, timeline::Span};
use hypercast_data::features::replay::{Replay, ReplayOptions};
use hypercast_data::import::simulate::{self, simulate};
use hypercast_stream::publish::{Publisher, TrainingPosition};
use hypercast_stream::streams::{self, MemoryEngine, Record, StreamEngine, Topic};
use hypercast_train::fm::{FIRST_VERSION, dataset_spec, trained_dir};

/// Stretches of each kind.
const ROUNDS: usize = 4;

/// How often it looks whether the last ones are applied.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// Requests that are learned from between two publications.
const LEARNED: usize = 32;

/// The largest share of the weights in a delta.
const SHARE: f64 = 0.3;

/// Adds the figures.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    let dir = folder()?;
    let mut fleet = Fleet::new(dir.path().join("said"), Shutdown::on_signals()?)?;
    let world = trained(dir.path(), options, &mut fleet)?;
    let config = Config::read(&world.two_tiers)?;
    let made = Made::new(&config, dir.path(), options.publications)?;
    report.add("weights of a delta", (made.share * 100.0, "% of the bytes"), None);
    let streams = streams::open(&config.engine)?;
    let to = streams.appender(&Topic::fm(FIRST_VERSION))?;
    to.append(&made.snapshot)?;
    register(&fleet, &world.two_tiers)?;
    let daemon = Daemon::start(&world.two_tiers)?;
    let caller = Caller::new(rank_url(&daemon), world.bodies(false)?)?;
    caller.one_by_one(200);
    let rate = 0.5e3 / quantile(&mut caller.one_by_one(400), 0.5);
    let before = counted(&daemon)?;
    let every = Duration::from_millis(options.publish_every_ms);
    let mut rounds = Rounds { every, ..Rounds::default() };
    for deltas in made.deltas.chunks(options.publications.div_ceil(ROUNDS)) {
        let lasting = every * deltas.len() as u32;
        rounds.quiet.push(caller.send(rate, lasting));
        let stretch = std::thread::scope(|scope| {
            let publishing = scope.spawn(|| {
                for delta in deltas {
                    to.append(delta)?;
                    std::thread::sleep(every);
                }
                Result::Ok(())
            });
            let stretch = caller.send(rate, lasting);
            publishing.join().expect("a publisher does not panic").map(|()| stretch)
        })?;
        rounds.busy.push(stretch);
    }
    let all = made.deltas.len() as f64;
    let start = std::time::Instant::now();
    let mut after = counted(&daemon)?;
    while after.applied - before.applied < all && start.elapsed() < PATIENCE {
        std::thread::sleep(LOOK_EVERY);
        after = counted(&daemon)?;
    }
    daemon.stop()?;
    fleet.stop()?;
    report.add("load, half of what one request at a time gives", (rate, "requests/s"), None);
    rounds.figures(report);
    let published = Rival { name: "published".into(), value: all };
    report.add("publications applied", (after.applied - before.applied, ""), Some(published));
    report.add("degraded requests", (after.degraded - before.degraded, ""), None);
    Ok(())
}

/// A world, its configuration and two trained tiers.
fn trained(dir: &Path, options: &Options, fleet: &mut Fleet) -> Result<World> {
    let world = World {
        two_tiers: dir.join("hypercast.toml"),
        one_stage: dir.join("hypercast.toml"),
        dataset: dir.join("data"),
    };
    simulate(&simulate::Options {
        into: world.dataset.clone(),
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
    keep_streams(&mut config, options.engine, (dir, fleet))?;
    config.experts = vec![mlp(options.plugin("mlp-fusion")?)];
    config.write(&world.two_tiers)?;
    for job in [["train", "fm"], ["train", "expert"]] {
        train(job, &world.two_tiers)?;
    }
    Ok(world)
}

/// The FM as it is published, and the expert on it, answer.
fn register(fleet: &Fleet, config: &Path) -> Result<()> {
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
        let (well, said) = fleet.ask(&args)?;
        if !well {
            return Err(Error::invalid(format!("versions {}: {said}", words.join(" "))));
        }
    }
    Ok(())
}

/// The records of publications.
struct Made {
    snapshot: Vec<Record>,
    deltas: Vec<Vec<Record>>,
    /// Bytes of the largest delta over those of all weights, before compression.
    share: f64,
}

impl Made {
    /// Goes on with the trained FM, and publishes after every few requests.
    fn new(config: &Config, dir: &Path, publications: usize) -> Result<Made> {
        let dataset = Dataset::open(&config.paths.dataset)?;
        let spec = dataset_spec(&dataset)?;
        let saved = trained_dir(config);
        let from = hypercast_fm::trainer::Resume { saved: &saved, work: &dir.join("learning") };
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
        publisher.publish(&trainer.trained(FIRST_VERSION)?, facts)?;
        let (snapshot, mut deltas, mut share) = (records()?, Vec::new(), 0.0f64);
        let mut examples = std::iter::empty().chain(replayed(&dataset, config)?);
        while deltas.len() < publications {
            let batch: Vec<_> =
                examples.by_ref().take(LEARNED).collect::<hypercast_data::Result<_>>()?;
            if batch.len() < LEARNED {
                // The same requests once more: weights move all the same.
                examples = std::iter::empty().chain(replayed(&dataset, config)?);
                continue;
            }
            let all: Vec<_> = batch.iter().collect();
            trainer.step(&all)?;
            let published = publisher.publish(&trainer.trained(FIRST_VERSION)?, facts)?;
            share = share.max(published.raw_bytes as f64 / published.all_bytes as f64);
            deltas.push(records()?);
        }
        Ok(Made { snapshot, deltas, share })
    }
}

/// The data set's requests as examples.
fn replayed(dataset: &Dataset, config: &Config) -> Result<Replay> {
    let options = ReplayOptions {
        span: Span::default(),
        history_len: config.fm.max_history,
        max_targets: config.fm.max_targets,
        features: config.features,
    };
    Ok(Replay::new(dataset, options)?)
}

/// Stretches of load.
#[derive(Default)]
struct Rounds {
    every: Duration,
    quiet: Vec<Stretch>,
    busy: Vec<Stretch>,
}

impl Rounds {
    fn figures(&self, report: &mut Report) {
        for (share, name) in [(0.5, "p50"), (0.99, "p99")] {
            let of = |stretches: &[Stretch]| {
                let mut each: Vec<f64> = stretches.iter().map(|s| s.answered(share)).collect();
                quantile(&mut each, 0.5)
            };
            let rival = Rival { name: "without".into(), value: of(&self.quiet) };
            let (ours, over) = (of(&self.busy), of(&self.busy) / rival.value);
            let name =
                format!("request, {name}, with publications every {} ms", self.every.as_millis());
            report.add(name.clone(), (ours, "ms"), Some(rival));
            report.add(format!("{name}, over without"), (over, "times"), None);
        }
        for (name, stretches) in [("without", &self.quiet), ("with", &self.busy)] {
            let sum = |of: fn(&Stretch) -> usize| stretches.iter().map(of).sum::<usize>() as f64;
            report.add(format!("requests {name} publications"), (sum(Stretch::requests), ""), None);
            let failed = sum(|s| s.failed + s.late + s.refused_ms.len());
            report.add(format!("of them not answered, {name}"), (failed, ""), None);
        }
    }
}

/// What the daemon counts.
struct Counted {
    applied: f64,
    degraded: f64,
}

fn counted(daemon: &Daemon) -> Result<Counted> {
    let url = format!("{}/metrics", daemon.url);
    let failed = |error: ureq::Error| Error::unreachable(format!("{url}: {error}"));
    let text = ureq::get(&url).call().map_err(failed)?.body_mut().read_to_string();
    let text = text.map_err(failed)?;
    let sum = |name: &str, label: &str| -> f64 {
        let lines = text.lines().filter(|line| line.starts_with(name) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    };
    Ok(Counted {
        applied: sum("hypercast_publications_total{", "outcome=\"applied\""),
        degraded: sum("hypercast_degraded_total{", ""),
    })
}
