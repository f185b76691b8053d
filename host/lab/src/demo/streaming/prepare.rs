//! The start of the streaming demo: a data set, two configurations that differ only in the FM's
//! size, and both FMs trained on the past, which ends where the stream begins.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hypercast_config::{Config, EngineKind};
use hypercast_data::{
    check,
    dataset::Dataset,
    simulate::{SimulateOptions, simulate},
};

use super::load::{self, ReplaySchedule};
use crate::{
    demo::{DatasetChoice, DemoOptions, StepTimes, preset, remove_dirs},
    error::Result,
    processes::ProcessGroup,
};

/// The expert of the demo, which serves every surface.
pub const EXPERT: &str = "ranker";

/// What two cores can serve beside four trainers. Without a given speed-up, a larger stream is
/// replayed in part.
const REQUESTS_PER_SECOND: f64 = 40.0;

/// Folders of an earlier demo, which are replaced.
const OWN_DIRS: [&str; 12] = [
    "data",
    "streams",
    "nats",
    "state",
    "logs",
    "logs-2",
    "fm",
    "fm-2",
    "fm-work",
    "fm-work-2",
    "experts",
    "process-logs",
];

/// A data set, and configurations whose FMs are trained on its past.
#[derive(Debug)]
pub struct DemoSetup {
    /// The data set.
    pub dataset: Dataset,
    /// What is replayed of it, and how fast.
    pub schedule: ReplaySchedule,
    /// The configuration of every process but the second FM's trainer.
    pub config: Config,
    /// Its path.
    pub first: PathBuf,
    /// The path of the second FM's configuration.
    pub second: PathBuf,
}

/// Removes what an earlier demo left in a work folder.
///
/// # Errors
/// A folder that cannot be removed.
pub fn clear(work: &Path) -> Result<()> {
    remove_dirs(OWN_DIRS.map(|name| work.join(name)))
}

/// Imports, writes the configurations, and trains both FMs on the past.
///
/// # Errors
/// The failure of a step.
pub fn prepare(
    options: &DemoOptions,
    processes: &ProcessGroup,
    times: &StepTimes,
) -> Result<DemoSetup> {
    let data = options.work().join("data");
    times.time("import", || import(options, &data))?;
    let dataset = Dataset::open(&data)?;
    check::admit(&dataset, options.source.force)?;
    let mut config = options.source.choice().config(&dataset, &options.plugins)?;
    // Else it begins after six tenths of the impressions.
    let (given, row) = (options.test_from.as_deref(), dataset.rows * 6 / 10);
    let from_ms = options.source.choice().test_from_ms(given, row, &config, &dataset)?;
    config.timeline.until = from_ms.to_string();
    let (requests, until_ms) = load::count(&dataset, from_ms)?;
    let span_s = ((until_ms - from_ms) as f64 / 1e3).max(1.0);
    let fits = span_s / (options.live.minutes * 60.0);
    let bearable = REQUESTS_PER_SECOND * span_s / requests as f64;
    let speed_up = options.live.speed_up.unwrap_or(fits.min(bearable).max(1.0));
    configure(options, speed_up, &mut config);
    let mut second = config.clone();
    config.fm.dim = if options.live.small { 16 } else { 32 };
    config.fm.layers = 1;
    config.fm.qk_dim = 16;
    config.fm.v_dim = 16;
    if options.live.small {
        second.fm.dim = 32;
        second.fm.qk_dim = 16;
        second.fm.v_dim = 16;
    }
    second.fm.seed = config.fm.seed + 1;
    second.paths.fm = "fm-2".into();
    second.paths.fm_work = "fm-work-2".into();
    second.paths.logs = "logs-2".into();
    let write = |config: &Config, name: &str| {
        let path = options.work().join(name);
        config.write(&path).map(|()| path)
    };
    let (first, second) = (write(&config, "hypercast.toml")?, write(&second, "second.toml")?);
    let config = Config::read(&first)?;
    for (step, path) in [("train_fm_1", &first), ("train_fm_2", &second)] {
        times.time(step, || processes.complete(&["train", "fm"], path))?;
    }
    let max_duration = Duration::from_secs_f64(options.live.minutes * 60.0);
    let late_ms = (config.join.max_window_s as i64 + 1) * 1000;
    let schedule = ReplaySchedule { from_ms, speed_up, requests, max_duration, late_ms };
    Ok(DemoSetup { dataset, schedule, config, first, second })
}

fn import(options: &DemoOptions, into: &Path) -> Result<()> {
    let DatasetChoice::Simulated = options.source.choice() else {
        return options.source.import(into);
    };
    let full = SimulateOptions { requests: 16_000, ..preset::world(into.to_path_buf()) };
    let small =
        SimulateOptions { users: 100, items: 100, requests: 1500, surfaces: 2, ..full.clone() };
    eprint!("{}", simulate(if options.live.small { &small } else { &full })?);
    Ok(())
}

/// A loop over minutes must publish and log within seconds.
fn configure(options: &DemoOptions, speed_up: f64, config: &mut Config) {
    config.engine.kind = options.live.engine;
    if let (EngineKind::Nats, Some(url)) = (options.live.engine, &options.live.nats_url) {
        config.engine.nats_url = url.as_str().into();
    }
    config.publish.every_s = if options.live.small { 1 } else { 5 };
    config.publish.snapshot_every = 20;
    config.logs.file_seconds = if options.live.small { 1 } else { 3 };
    config.fm.save_every_requests = 2000;
    // The FMs are small, so that they keep up with the replay; the expert is as beside large ones.
    config.plugin_limits.max_flops_share = 2.0;
    // Pretraining on events without times would take longer than the whole demo.
    config.fm.pretraining_passes = 0;
    // Half a second of the replay is this long in event time: a shorter window would end between
    // two bodies of one moment.
    config.join.min_window_s = (speed_up * 0.5).ceil().max(5.0) as u64;
    config.join.first_window_s = config.join.min_window_s.max(300);
    config.join.max_window_s = 2 * config.join.first_window_s;
    config.join.correction_s = 100 * config.join.max_window_s;
    config.experts = vec![preset::expert(EXPERT, options.plugins.join("mlp-fusion.wasm"))];
}
