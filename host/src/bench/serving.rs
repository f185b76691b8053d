//! The daemon under load from another process: how much it serves in time, and
//! what becomes of it at twice that.
//!
//! A simulated world gives every user a history of 256 events; a request has 200
//! candidates. Models are trained as an operator trains them.

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
    timing::quantile,
};
use crate::{
    config::{Config, ExpertEntry, TrainOn},
    dataset::Dataset,
    demo::daemon::Daemon,
    error::{Error, Result},
    import::simulate::{self, simulate},
    serve::api::RankAnswer,
};

const USERS: usize = 300;
const ITEMS: usize = 5_000;
const CANDIDATES: usize = 200;
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
    if options.wants("load") { load(options, report) } else { Ok(()) }
}

/// A daemon and its caller.
fn load(options: &Options, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let config = trained(dir.path(), options.plugin("mlp-fusion")?)?;
    let daemon = Daemon::start(&config)?;
    let url = format!("{}/v1/rank", daemon.url);
    let caller = Caller::new(url.clone(), bodies(dir.path(), false)?)?;
    caller.one_by_one(200);
    stages(&daemon.url, dir.path(), report)?;
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

/// A rate at which 99 of 100 requests are answered in time: raised by steps from below what one at a time suggests.
fn peak(caller: &Caller, one_by_one: f64, report: &mut Report) -> Option<(f64, Stretch)> {
    let mut best = None;
    for step in 0..40 {
        let rate = one_by_one * 0.5 * 1.15f64.powi(step);
        let stretch = caller.send(rate, STRETCH);
        let answered = stretch.answered_ms.len() as f64 / stretch.requests().max(1) as f64;
        let p99 = stretch.answered(0.99);
        eprintln!("  {rate:.0} requests/s: {:.1} % answered, p99 {p99:.1} ms", answered * 100.0);
        if answered < 0.99 || p99 > TARGET_MS {
            report.version("load_steps", &format!("{}", step + 1));
            break;
        }
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

/// What each stage takes of a request alone, beside the FM, which is a one-stage model of its size.
fn stages(url: &str, dir: &Path, report: &mut Report) -> Result<()> {
    let mut took: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for body in bodies(dir, true)?.iter().take(300) {
        let failed = |error: ureq::Error| Error::Invalid(format!("the daemon failed: {error}"));
        let mut answer = ureq::post(format!("{url}/v1/rank"))
            .header("content-type", "application/json")
            .send(body)
            .map_err(failed)?;
        let answer: RankAnswer = answer.body_mut().read_json().map_err(failed)?;
        for (stage, us) in answer.explain.map(|explain| explain.stages_us).unwrap_or_default() {
            took.entry(stage).or_default().push(us / 1e3);
        }
    }
    let median = |stage: &str| took.get(stage).map_or(0.0, |took| quantile(&mut took.clone(), 0.5));
    for stage in ["features", "fm", "expert", "wasm"] {
        report.add(format!("stage {stage}, p50"), (median(stage), "ms"), None);
    }
    let both = median("fm") + median("expert") + median("wasm");
    let rival = Rival { name: "the FM alone".into(), value: median("fm") };
    report.add("FM, expert and its Wasm, p50", (both, "ms"), Some(rival));
    Ok(())
}

/// A world, an FM and an expert in `dir`: the path of their configuration.
fn trained(dir: &Path, plugin: PathBuf) -> Result<PathBuf> {
    let options = simulate::Options {
        into: dir.join("data"),
        users: USERS,
        items: ITEMS,
        requests: USERS * 50,
        surfaces: 2,
        seed: 1,
    };
    simulate(&options)?;
    let mut config = Config {
        experts: vec![ExpertEntry {
            name: "mlp".into(),
            plugin,
            surfaces: Vec::new(),
            without_tae: false,
            shadow: false,
            train_on: TrainOn::All,
        }],
        ..Config::default()
    };
    config.fm.max_history = HISTORY;
    config.features.history_events = HISTORY;
    config.server.deadline_ms = TARGET_MS as u64;
    let path = dir.join("hypercast.toml");
    config.write(&path)?;
    for job in [["train", "fm"], ["train", "expert"]] {
        let failed = |error: std::io::Error| Error::Invalid(format!("cannot train: {error}"));
        let program = std::env::current_exe().map_err(failed)?;
        let status = Command::new(program)
            .args(job)
            .arg("--config")
            .arg(&path)
            .stdout(std::process::Stdio::null())
            .status()
            .map_err(failed)?;
        if !status.success() {
            return Err(Error::Invalid(format!("`hypercast {}` failed; see above", job.join(" "))));
        }
    }
    Ok(path)
}

/// Requests of all users for drawn candidates.
fn bodies(dir: &Path, explain: bool) -> Result<Vec<String>> {
    let dataset = Dataset::open(&dir.join("data"))?;
    let mut newest = BTreeMap::<u64, i64>::new();
    for impression in dataset.impressions()? {
        let impression = impression?;
        newest.insert(impression.user, impression.time_ms);
    }
    let time_ms = newest.values().max().copied().unwrap_or(0) + 1;
    let mut items: Vec<u64> = dataset.items.keys().copied().collect();
    items.sort_unstable();
    let mut random = SmallRng::seed_from_u64(3);
    let surface = &dataset.schema.surfaces[0];
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
