//! The daemon under load from another process: how much it serves in time, and
//! what becomes of it at twice that.
//!
//! A simulated world gives every user a history of 256 events; a request has 200
//! candidates. Models are trained as an operator trains them.

use hypercast_core::quantile::quantile;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::json;

use super::{
    Options, Report, Rival, fm,
    load::{Caller, Stretch},
    stages,
};
use crate::demo::daemon::Daemon;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_data::dataset::Dataset;
use hypercast_data::import::simulate::{self, simulate};

const USERS: usize = 300;
const ITEMS: usize = 5_000;
pub(super) const CANDIDATES: usize = 200;
const HISTORY: usize = 256;

/// The latency that 99 of 100 requests must keep, in milliseconds.
const TARGET_MS: f64 = 50.0;

/// How long each rate is tried.
const STRETCH: Duration = Duration::from_secs(8);

/// Adds the figures of the part.
///
/// # Errors
/// A plugin that is not built; whatever training and serving say.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    if options.wants("logging") {
        fm::logging(options, report)?;
    }
    let (of_stages, of_load) = (options.wants("stages"), options.wants("load"));
    if !of_stages && !of_load {
        return Ok(());
    }
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let world = World::trained(dir.path(), options.plugin("mlp-fusion")?)?;
    if of_stages {
        stages::measure(&world, report)?;
    }
    if of_load { load(&world, report) } else { Ok(()) }
}

/// What daemons are started from, and asked.
pub(super) struct World {
    /// An FM and an expert.
    pub(super) two_tiers: PathBuf,
    /// The FM alone: a one-stage model of its size.
    pub(super) one_stage: PathBuf,
    /// The data of both.
    pub(super) dataset: PathBuf,
}

/// A daemon and its caller.
fn load(world: &World, report: &mut Report) -> Result<()> {
    let daemon = Daemon::start(&world.two_tiers)?;
    let caller = Caller::new(rank_url(&daemon), world.bodies(false)?)?;
    caller.one_by_one(200);
    let alone = quantile(&mut caller.one_by_one(400), 0.5);
    report.add(format!("request of {CANDIDATES} candidates alone, p50"), (alone, "ms"), None);
    let peak = peak(&caller, 1e3 / alone, report);
    let Some((rate, at_peak)) = peak else {
        report.note(format!("no rate kept p99 under {TARGET_MS} ms"));
        return daemon.stop();
    };
    let memory = daemon.memory_mib();
    report.add(format!("highest rate with p99 <= {TARGET_MS} ms"), (rate, "requests/s"), None);
    report.add("p50 at that rate", (at_peak.answered(0.5), "ms"), None);
    report.add("p99 at that rate", (at_peak.answered(0.99), "ms"), None);
    overload(&caller, rate, &at_peak, report);
    let rival = Rival { name: "before it".into(), value: memory };
    report.add("memory after twice the rate", (daemon.memory_mib(), "MiB"), Some(rival));
    daemon.stop()
}

/// Where a daemon takes requests for a ranking.
pub(super) fn rank_url(daemon: &Daemon) -> String {
    format!("{}/v1/rank", daemon.url)
}

/// A rate at which 99 of 100 requests are answered in time: raised by steps from below what one at a time suggests, until
/// two in a row fail. One alone may have met what else the machine does.
fn peak(caller: &Caller, one_by_one: f64, report: &mut Report) -> Option<(f64, Stretch)> {
    let (mut best, mut failed) = (None, 0);
    for step in 0..40 {
        let rate = one_by_one * 0.5 * 1.15f64.powi(step);
        let stretch = caller.send(rate, STRETCH);
        let answered = stretch.answered_ms.len() as f64 / stretch.requests().max(1) as f64;
        let p99 = stretch.answered(0.99);
        eprintln!("  {rate:.0} requests/s: {:.1} % answered, p99 {p99:.1} ms", answered * 100.0);
        if answered < 0.99 || p99 > TARGET_MS {
            failed += 1;
            if failed == 2 {
                report.version("load_steps", &format!("{}", step + 1));
                break;
            }
            continue;
        }
        failed = 0;
        best = Some((rate, stretch));
    }
    best
}

/// Twice the rate.
fn overload(caller: &Caller, rate: f64, at_peak: &Stretch, report: &mut Report) {
    let mut twice = caller.send(2.0 * rate, 2 * STRETCH);
    let rival = |name: &str, value| Some(Rival { name: name.into(), value });
    report.add(
        "goodput at twice the rate",
        (twice.goodput(TARGET_MS), "requests/s"),
        rival("at the rate", at_peak.goodput(TARGET_MS)),
    );
    let late = twice.late as f64 / twice.requests().max(1) as f64 * 100.0;
    report.add("let in at twice the rate, and late", (late, "% of requests"), None);
    if twice.failed > 0 {
        report.note(format!("{} requests got no proper status", twice.failed));
    }
    match twice.refused_ms.is_empty() {
        true => report.note("no request was refused at twice the rate"),
        false => {
            let refused = quantile(&mut twice.refused_ms, 0.99);
            report.add("status of a refused request, p99", (refused, "ms"), None);
        }
    }
}

impl World {
    /// Simulates a world in `dir`, and trains an FM and an expert.
    fn trained(dir: &Path, plugin: PathBuf) -> Result<Self> {
        let dataset = dir.join("data");
        simulate(&simulate::Options {
            into: dataset.clone(),
            users: USERS,
            items: ITEMS,
            requests: USERS * 50,
            surfaces: 2,
            seed: 1,
        })?;
        let world = Self {
            two_tiers: dir.join("hypercast.toml"),
            one_stage: dir.join("one-stage.toml"),
            dataset,
        };
        let mut config = Config::default();
        config.fm.max_history = HISTORY;
        config.features.history_events = HISTORY;
        config.server.deadline_ms = TARGET_MS as u64;
        // Two daemons cannot have one joiner or state, and nothing is told of events here.
        config.join.in_daemon = false;
        config.paths.state = "runs/one-stage".into();
        config.write(&world.one_stage)?;
        config.paths.state = Config::default().paths.state;
        config.experts = vec![mlp(plugin)];
        config.write(&world.two_tiers)?;
        for job in [["train", "fm"], ["train", "expert"]] {
            train(job, &world.two_tiers)?;
        }
        Ok(world)
    }

    /// Requests of all users for drawn candidates.
    pub(super) fn bodies(&self, explain: bool) -> Result<Vec<String>> {
        bodies(&self.dataset, 0, explain)
    }
}

/// An expert on every surface.
pub(super) fn mlp(plugin: PathBuf) -> ExpertEntry {
    ExpertEntry {
        name: "mlp".into(),
        plugin,
        surfaces: Vec::new(),
        without_tae: false,
        shadow: false,
        train_on: TrainOn::All,
        limits: Default::default(),
    }
}

/// Requests on a surface of all users of a data set, for drawn candidates.
pub(super) fn bodies(dataset: &Path, surface: usize, explain: bool) -> Result<Vec<String>> {
    let dataset = Dataset::open(dataset)?;
    let mut newest = BTreeMap::<u64, i64>::new();
    for impression in dataset.impressions()? {
        let impression = impression?;
        newest.insert(impression.user, impression.time_ms);
    }
    let time_ms = newest.values().max().copied().unwrap_or(0) + 1;
    let mut items: Vec<u64> = dataset.items.keys().copied().collect();
    items.sort_unstable();
    let mut random = SmallRng::seed_from_u64(3);
    let surface = &dataset.schema.surfaces[surface];
    let body = |user: &u64| {
        let candidates: Vec<_> = (0..CANDIDATES)
            .map(|_| json!({ "id": items[random.random_range(0..items.len())] }))
            .collect();
        json!({
            "user": user, "surface": surface, "candidates": candidates,
            "time_ms": time_ms, "explain": explain,
        })
        .to_string()
    };
    Ok(newest.keys().map(body).collect())
}

/// Runs a training as an operator does.
pub(super) fn train(job: [&str; 2], config: &Path) -> Result<()> {
    let failed = |error: std::io::Error| Error::invalid(format!("cannot train: {error}"));
    let program = crate::program::hypercast()?;
    let status = Command::new(program)
        .args(job)
        .arg("--config")
        .arg(config)
        .stdout(std::process::Stdio::null())
        .status()
        .map_err(failed)?;
    match status.success() {
        true => Ok(()),
        false => Err(Error::invalid(format!("`hypercast {}` failed; see above", job.join(" ")))),
    }
}
