//! The cost of a faulty plugin to the others: their latency while it spins or traps on every
//! request, and memory after many faults. Also the memory per plugin, and what Wasm adds to a
//! ranking.
//!
//! Neighbours are measured from another process, at a rate that leaves the daemon room, and
//! compared with the same load beside a well-behaved plugin, in turns.

use std::{
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use hypercast_config::{Config, ExpertEntry};
use hypercast_core::quantile::quantile;
use hypercast_data::{
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};
use hypercast_expert::{BreakerConfig, Engine, RankOutcome, ServedExpert, Tae, wasm::EngineConfig};
use hypercast_fm::example::Example;

use super::{
    BenchOptions, BenchReport,
    expert::ExpertFixture,
    load::{LoadResult, OpenLoopClient},
    serving::{rank_client, train_both},
};
use crate::{
    demo::preset,
    error::{CommonErrors as _, Error, Result},
    processes::{DaemonProcess, resident_mib},
};

/// The plugins beside the measured one, each on a surface of its own.
const NEIGHBOURS: [&str; 3] = ["good", "spin", "trap"];

/// How long each neighbour is measured from its first request on, and how often.
const STRETCH: Duration = Duration::from_secs(30);
const TURNS: usize = 3;

/// Faults between two measurements of memory.
const FAULTS: usize = 100_000;

/// Plugins that are loaded together.
const PLUGINS: u64 = 100;

/// The others' latency, with each neighbour in turn.
pub fn neighbours(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let dir = super::temporary()?;
    let config = world(options, dir.path())?;
    let dataset = dir.path().join("data");
    let mut p99_ms: [Vec<f64>; 3] = Default::default();
    let mut p50_ms: [Vec<f64>; 3] = Default::default();
    let mut rate = None;
    for _ in 0..TURNS {
        for (at, neighbour) in NEIGHBOURS.iter().enumerate() {
            // A new daemon each time, so that the neighbour's breaker begins closed.
            let daemon = DaemonProcess::start(&config)?;
            let own = rank_client(&daemon, &dataset, 0)?;
            let others = rank_client(&daemon, &dataset, at + 1)?;
            let alone_ms = quantile(&mut own.one_by_one(100), 0.5);
            // A fifth of what one request at a time suggests, since client and daemon share the
            // machine; the same beside every neighbour.
            let rate = *rate.get_or_insert(0.2e3 / alone_ms);
            let own = beside(&own, &others, rate);
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
            let what = format!("others' {share} beside a plugin that {name}s on every request");
            report.versus(what, value, "ms", "beside a good one", good);
        }
    }
    Ok(())
}

fn beside(own: &OpenLoopClient, others: &OpenLoopClient, rate: f64) -> LoadResult {
    thread::scope(|scope| {
        let others = scope.spawn(|| others.send(rate, STRETCH));
        let own = own.send(rate, STRETCH);
        others.join().expect("a client does not panic");
        own
    })
}

/// A world of four surfaces: one for the measured plugin, and one for each neighbour.
fn world(options: &BenchOptions, dir: &Path) -> Result<PathBuf> {
    let path = dir.join("hypercast.toml");
    let world = super::world(dir);
    let world = SimulateOptions { users: 200, items: 1000, requests: 2000, surfaces: 4, ..world };
    simulate(&world)?;
    let surfaces = Dataset::open(&world.into)?.schema.surfaces.clone();
    let mut config = Config::default();
    (config.fm.dim, config.fm.qk_dim, config.fm.v_dim) = (32, 16, 16);
    config.fm.max_history = 64;
    config.expert_training.epochs = 1;
    // There are no events here.
    config.join.in_daemon = false;
    let entry = |name: &str, plugin, surface: usize| ExpertEntry {
        surfaces: vec![surfaces[surface].clone()],
        ..preset::expert(name, plugin)
    };
    let good = options.plugin("mlp-fusion")?;
    config.experts = vec![entry("measured", good.clone(), 0), entry("good", good, 1)];
    for (at, name) in NEIGHBOURS.iter().enumerate().skip(1) {
        config.experts.push(entry(name, options.hostile(name)?, at + 1));
    }
    config.write(&path)?;
    train_both(&path)?;
    Ok(path)
}

/// Memory before and after many faults.
pub fn faults(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let fixture = ExpertFixture::new()?;
    let engine = Engine::new(EngineConfig::default())?;
    for name in ["trap", "bomb"] {
        let never = BreakerConfig { faults: u32::MAX, lost_share: f64::MAX, ..Default::default() };
        let bytes = read(&options.hostile(name)?)?;
        let expert = fixture.load(&engine, name, &bytes, never)?;
        // A guest that fills its memory before it faults takes a thousand times as long.
        let count = if name == "trap" { FAULTS } else { FAULTS / 1000 };
        fail(&expert, &fixture.example, count / 10)?;
        let before = own_memory_mib();
        fail(&expert, &fixture.example, count)?;
        let what = format!("memory after {count} faults of {name}");
        report.versus(what, own_memory_mib(), "MiB", "before", before);
    }
    Ok(())
}

fn fail(expert: &ServedExpert, example: &Example, times: usize) -> Result<()> {
    for _ in 0..times {
        let (RankOutcome::Degraded(_), _) = expert.serve(example, Tae::Without, 10) else {
            let name = expert.name();
            return Err(Error::internal(format!("{name} ranked, although it should fail")));
        };
        expert.prepare();
    }
    Ok(())
}

/// Memory of a loaded plugin with its parameters, by loading many.
pub fn plugins(options: &BenchOptions, report: &mut BenchReport) -> Result<()> {
    let fixture = ExpertFixture::new()?;
    let engine = Engine::new(EngineConfig::default())?;
    let bytes = read(&options.plugin("mlp-fusion")?)?;
    // A custom section makes each a different component, so that they share nothing.
    let another = |mark: u64| [&bytes[..], &[0, 10, 1, b'm'], &mark.to_le_bytes()].concat();
    let load = |mark| fixture.load(&engine, "mlp-fusion", &another(mark), BreakerConfig::default());
    // The first also loads the compiler, which the others share.
    let first = load(PLUGINS)?;
    let serve = |expert: &ServedExpert| expert.serve(&fixture.example, Tae::Without, 10);
    serve(&first);
    let before = own_memory_mib();
    let loaded = (0..PLUGINS).map(load).collect::<Result<Vec<_>>>()?;
    for expert in &loaded {
        serve(expert);
        expert.prepare();
    }
    let each = (own_memory_mib() - before) / PLUGINS as f64;
    let what = format!("memory a plugin, {PLUGINS} loaded and asked");
    report.figure(what, each, "MiB");
    let parameters: usize =
        first.blueprint().graph.parameters.iter().map(|parameter| parameter.len()).sum();
    let of_them = parameters as f64 * 4.0 / f64::from(1 << 20);
    report.figure("of which its parameters", of_them, "MiB");
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(Error::io(path))
}

fn own_memory_mib() -> f64 {
    resident_mib(std::process::id())
}
