//! What a bad plugin costs the others: their latency while one spins or traps on
//! every request, memory after many faults, memory a plugin, and what Wasm adds to a ranking.
//!
//! Neighbours are measured from another process, at a rate that leaves the daemon room: what is compared is the same
//! load with a well-behaved plugin in the bad one's place, in turns.

use hypercast_core::quantile::quantile;
use std::{path::Path, sync::Arc, thread, time::Duration};

use hypercast_fm::example::Example;

use super::{
    Options, Report, Rival, expert,
    load::{Caller, Stretch},
    serving::{bodies, rank_url, train},
};
use crate::demo::daemon::Daemon;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, ExpertEntry, TrainOn};
use hypercast_data::dataset::Dataset;
use hypercast_data::import::simulate::{self, simulate};
use hypercast_expert::{
    Blueprint, BreakerConfig, Engine, Expert, LoadOptions, Normaliser, Plugin, RankOutcome, Tae,
    wasm::EngineConfig,
};

/// Who shares the daemon with the plugin that is measured: a surface each.
const NEIGHBOURS: [&str; 3] = ["good", "spin", "trap"];

/// How long each neighbour is tried, from its first request on, and how often.
const STRETCH: Duration = Duration::from_secs(30);
const TURNS: usize = 3;

/// Faults that memory is compared over.
const FAULTS: usize = 100_000;

/// Plugins that are loaded together.
const PLUGINS: u64 = 100;

/// Adds the figures of the part.
///
/// # Errors
/// Plugins that are not built; whatever training and serving say.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    if options.wants("rank") {
        expert::rank_alone(options, report)?;
    }
    if options.wants("faults") {
        faults(options, report)?;
    }
    if options.wants("plugins") {
        plugins(options, report)?;
    }
    if options.wants("neighbours") {
        neighbours(options, report)?;
    }
    Ok(())
}

/// The others' latency, with each neighbour in turn.
fn neighbours(options: &Options, report: &mut Report) -> Result<()> {
    let dir = tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))?;
    let config = world(options, dir.path())?;
    let dataset = dir.path().join("data");
    let mut p99_ms: [Vec<f64>; 3] = Default::default();
    let mut p50_ms: [Vec<f64>; 3] = Default::default();
    let mut rate = None;
    for _ in 0..TURNS {
        for (at, neighbour) in NEIGHBOURS.iter().enumerate() {
            // A daemon each: the neighbour's breaker begins closed.
            let daemon = Daemon::start(&config)?;
            let own = Caller::new(rank_url(&daemon), bodies(&dataset, 0, false)?)?;
            let others = Caller::new(rank_url(&daemon), bodies(&dataset, at + 1, false)?)?;
            let alone_ms = quantile(&mut own.one_by_one(100), 0.5);
            // A fifth of what one request at a time suggests, each: caller and daemon share the machine. The same beside all.
            let rate = *rate.get_or_insert(0.2e3 / alone_ms);
            let (own, _) = beside(&own, &others, rate);
            let (p50, p99) = (own.answered(0.5), own.answered(0.99));
            eprintln!(
                "  beside {neighbour}, {rate:.0} requests/s each: p50 {p50:.2}, p99 {p99:.2} ms"
            );
            p50_ms[at].push(p50);
            p99_ms[at].push(p99);
            daemon.stop()?;
        }
    }
    for (share, times) in [("p50", p50_ms), ("p99", p99_ms)] {
        let [good, bad @ ..] = times.map(|mut times| quantile(&mut times, 0.5));
        for (name, value) in NEIGHBOURS[1..].iter().zip(bad) {
            let rival = Rival { name: "beside a good one".into(), value: good };
            let what = format!("others' {share} beside a plugin that {name}s on every request");
            report.add(what, (value, "ms"), Some(rival));
        }
    }
    Ok(())
}

fn beside(own: &Caller, others: &Caller, rate: f64) -> (Stretch, Stretch) {
    thread::scope(|scope| {
        let others = scope.spawn(|| others.send(rate, STRETCH));
        let own = own.send(rate, STRETCH);
        (own, others.join().expect("a caller does not panic"))
    })
}

/// A world of four surfaces: the measured plugin's, and one for each neighbour.
fn world(options: &Options, dir: &Path) -> Result<std::path::PathBuf> {
    let (path, into) = (dir.join("hypercast.toml"), dir.join("data"));
    simulate(&simulate::Options {
        into: into.clone(),
        users: 200,
        items: 1000,
        requests: 2000,
        surfaces: 4,
        seed: 1,
    })?;
    let surfaces = Dataset::open(&into)?.schema.surfaces.clone();
    let mut config = Config::default();
    (config.fm.dim, config.fm.qk_dim, config.fm.v_dim) = (32, 16, 16);
    config.fm.max_history = 64;
    config.expert_training.epochs = 1;
    // Nothing is told of events here.
    config.join.in_daemon = false;
    let entry = |name: &str, plugin, surface: usize| ExpertEntry {
        name: name.into(),
        plugin,
        surfaces: vec![surfaces[surface].clone()],
        without_tae: false,
        shadow: false,
        train_on: TrainOn::All,
        limits: Default::default(),
    };
    let good = options.plugin("mlp-fusion")?;
    config.experts = vec![entry("measured", good.clone(), 0), entry("good", good, 1)];
    for (at, name) in NEIGHBOURS.iter().enumerate().skip(1) {
        config.experts.push(entry(name, options.hostile(name)?, at + 1));
    }
    config.write(&path)?;
    for job in [["train", "fm"], ["train", "expert"]] {
        train(job, &path)?;
    }
    Ok(path)
}

/// Memory before and after many faults.
fn faults(options: &Options, report: &mut Report) -> Result<()> {
    let ground = expert::Ground::new()?;
    let engine = Engine::new(EngineConfig::default())?;
    for name in ["trap", "bomb"] {
        let never = BreakerConfig { faults: u32::MAX, lost_share: f64::MAX, ..Default::default() };
        let bytes = read(&options.hostile(name)?)?;
        let expert = load(&engine, &ground, (name, &bytes), never)?;
        // A guest that fills its memory before it faults takes a thousand times as long.
        let count = if name == "trap" { FAULTS } else { FAULTS / 1000 };
        fail(&expert, &ground.example, count / 10)?;
        let before = resident_mib();
        fail(&expert, &ground.example, count)?;
        let rival = Rival { name: "before".into(), value: before };
        let what = format!("memory after {count} faults of {name}");
        report.add(what, (resident_mib(), "MiB"), Some(rival));
    }
    Ok(())
}

fn fail(expert: &Expert, example: &Example, times: usize) -> Result<()> {
    for _ in 0..times {
        let (RankOutcome::Degraded(_), _) = expert.serve(example, Tae::Without, 10) else {
            return Err(Error::invalid(format!("{} was to fail, and ranked", expert.name())));
        };
        expert.prepare();
    }
    Ok(())
}

/// Memory of a loaded plugin with its parameters, by loading many.
fn plugins(options: &Options, report: &mut Report) -> Result<()> {
    let ground = expert::Ground::new()?;
    let engine = Engine::new(EngineConfig::default())?;
    let bytes = read(&options.plugin("mlp-fusion")?)?;
    // A custom section of its own makes each another component, of which nothing is shared.
    let another = |mark: u64| [&bytes[..], &[0, 10, 1, b'm'], &mark.to_le_bytes()].concat();
    let load =
        |mark| load(&engine, &ground, ("mlp-fusion", &another(mark)), BreakerConfig::default());
    // What the first brings with it, compiler and all, is not the others'.
    let first = load(PLUGINS)?;
    let serve = |expert: &Expert| expert.serve(&ground.example, Tae::Without, 10);
    serve(&first);
    let before = resident_mib();
    let loaded = (0..PLUGINS).map(load).collect::<Result<Vec<_>>>()?;
    for expert in &loaded {
        serve(expert);
        expert.prepare();
    }
    let each = (resident_mib() - before) / PLUGINS as f64;
    report.add(format!("memory a plugin, {PLUGINS} loaded and asked"), (each, "MiB"), None);
    let parameters: usize =
        first.blueprint().graph.parameters.iter().map(|parameter| parameter.len()).sum();
    let of_them = parameters as f64 * 4.0 / f64::from(1 << 20);
    report.add("of which its parameters", (of_them, "MiB"), None);
    Ok(())
}

fn load(
    engine: &Engine,
    ground: &expert::Ground,
    (name, bytes): (&str, &[u8]),
    breaker: BreakerConfig,
) -> Result<Expert> {
    let limits = Config::default().plugin_limits.load_options();
    let options = LoadOptions { tae_dim: 64, fm_version: Some("1.0.0".into()), ..limits };
    let plugin = Plugin::from_bytes(engine, name, bytes, &options.limits)?;
    let blueprint = Arc::new(Blueprint::new(plugin, &ground.dataset.schema, &options)?);
    let normaliser = Normaliser::identity(blueprint.columns.feature_names());
    let parameters = blueprint.init_parameters(normaliser, 1);
    Ok(Expert::new(blueprint, parameters, Config::default().device, breaker)?)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(path))
}

/// What this process has in memory, in MiB; 0 where the system does not say.
fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
