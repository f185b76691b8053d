//! What the loop begins with: a data set, two configurations that differ in the
//! FM's size alone, and both FMs trained on the past.
//!
//! The past ends where the stream begins; nothing of what comes after it is learned here.

use std::path::{Path, PathBuf};

use super::{Options, drive, processes::Fleet};
use crate::demo::{Data, Seconds, preset};
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, EngineKind, ExpertEntry, TrainOn, parse_time_ms};
use hypercast_data::dataset::Dataset;
use hypercast_data::import::simulate;

/// The expert of the demo, which serves every surface.
pub const EXPERT: &str = "ranker";

/// What two cores bear beside four trainers; a larger stream is replayed in part unless a speed-up is asked for.
const REQUESTS_PER_SECOND: f64 = 40.0;

/// What an earlier demo wrote, which is replaced.
const OWN: [&str; 12] = [
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
    "said",
];

/// A data set with its past learned.
#[derive(Debug)]
pub struct Ground {
    /// The data set.
    pub dataset: Dataset,
    /// Where the stream begins, milliseconds since the epoch.
    pub from_ms: i64,
    /// Requests of the stream.
    pub requests: u64,
    /// Event time over wall time.
    pub speed_up: f64,
    /// What every process reads, but for the second FM's trainer.
    pub config: Config,
    /// Where that is.
    pub first: PathBuf,
    /// The configuration of the second FM's trainer.
    pub second: PathBuf,
}

/// Removes what an earlier demo left in a work folder.
///
/// # Errors
/// What the file system says.
pub fn clear(work: &Path) -> Result<()> {
    for dir in OWN.map(|name| work.join(name)) {
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(&dir)(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Imports, writes the configurations, and trains both FMs on the past.
///
/// # Errors
/// Whatever a step says.
pub fn prepare(options: &Options, fleet: &Fleet, seconds: &mut Seconds) -> Result<Ground> {
    let data = options.base.work.join("data");
    seconds.time("import", || import(options, &data))?;
    let dataset = Dataset::open(&data)?;
    let mut config = options.base.source.data.config(&dataset.schema, &options.base.plugins);
    let from_ms = from_ms(options, &config, &dataset)?;
    config.timeline.until = from_ms.to_string();
    let (requests, until_ms) = drive::count(&dataset, from_ms)?;
    let span_s = ((until_ms - from_ms) as f64 / 1e3).max(1.0);
    let fits = span_s / (options.minutes * 60.0);
    let bearable = REQUESTS_PER_SECOND * span_s / requests as f64;
    let speed_up = options.speed_up.unwrap_or(fits.min(bearable).max(1.0));
    configure(options, speed_up, &mut config);
    let mut second = config.clone();
    config.fm.dim = if options.small { 16 } else { 32 };
    config.fm.layers = 1;
    config.fm.qk_dim = 16;
    config.fm.v_dim = 16;
    if options.small {
        second.fm.dim = 32;
        second.fm.qk_dim = 16;
        second.fm.v_dim = 16;
    }
    second.fm.seed = config.fm.seed + 1;
    second.paths.fm = "fm-2".into();
    second.paths.fm_work = "fm-work-2".into();
    second.paths.logs = "logs-2".into();
    let write = |config: &Config, name: &str| {
        let path = options.base.work.join(name);
        config.write(&path).map(|()| path)
    };
    let (first, second) = (write(&config, "hypercast.toml")?, write(&second, "second.toml")?);
    let config = Config::read(&first)?;
    for (step, path) in [("train_fm_1", &first), ("train_fm_2", &second)] {
        let args = ["train".as_ref(), "fm".as_ref(), "--config".as_ref(), path.as_os_str()];
        seconds.time(step, || fleet.complete(&args))?;
    }
    Ok(Ground { dataset, from_ms, requests, speed_up, config, first, second })
}

fn import(options: &Options, into: &Path) -> Result<()> {
    if let Data::Simulated = options.base.source.data {
        let full = preset::world(into.to_path_buf());
        let world = match options.small {
            true => {
                simulate::Options { users: 100, items: 100, requests: 1500, surfaces: 2, ..full }
            }
            false => simulate::Options { requests: 16_000, ..full },
        };
        eprint!("{}", simulate::simulate(&world)?);
        return Ok(());
    }
    options.base.source.import(into)
}

/// Where the stream begins: as asked, at the data set's own date, else after six tenths of its impressions.
fn from_ms(options: &Options, config: &Config, dataset: &Dataset) -> Result<i64> {
    match (&options.base.test_from, options.base.source.data) {
        (Some(asked), _) => Ok(parse_time_ms(asked, config.timeline.utc_offset_h)?),
        (None, Data::Kuairand) => options.base.source.data.test_from_ms(None, config, dataset),
        (None, Data::Movielens | Data::Simulated) => {
            match dataset.impressions()?.nth(dataset.rows * 6 / 10) {
                Some(impression) => Ok(impression?.time_ms),
                None => Err(Error::invalid("the data set is empty")),
            }
        }
    }
}

/// What a loop over minutes needs: it publishes and logs within seconds.
fn configure(options: &Options, speed_up: f64, config: &mut Config) {
    config.engine.kind = options.engine;
    if let (EngineKind::Nats, Some(url)) = (options.engine, &options.nats_url) {
        config.engine.nats_url.clone_from(url);
    }
    config.publish.every_s = if options.small { 1 } else { 5 };
    config.publish.snapshot_every = 20;
    config.logs.file_seconds = if options.small { 1 } else { 3 };
    config.fm.save_every_requests = 2000;
    // The past is learned in a minute or two: what has no times is left out.
    config.fm.pretraining_passes = 0;
    // What happens at once here is so far apart in the events' own time: a shorter window would end between two bodies
    // of one moment.
    config.join.min_window_s = (speed_up * 0.5).ceil().max(5.0) as u64;
    config.join.first_window_s = config.join.min_window_s.max(300);
    config.join.max_window_s = 2 * config.join.first_window_s;
    config.join.correction_s = 100 * config.join.max_window_s;
    config.experts = vec![ExpertEntry {
        name: EXPERT.into(),
        plugin: options.base.plugins.join("mlp-fusion.wasm"),
        surfaces: Vec::new(),
        without_tae: false,
        shadow: false,
        train_on: TrainOn::All,
        limits: Default::default(),
    }];
}
