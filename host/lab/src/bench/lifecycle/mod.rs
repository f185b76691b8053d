//! The lifecycle at work: ingest and join at a rate, how old events are when they
//! are learned from, and what publications cost the requests that are served meanwhile.
//!
//! Every part is a process of its own over loopback, as an operator runs them, with files below the
//! temporary folder (`TMPDIR`) on which appends wait for the disk.

mod ingest;
mod latency;
mod publish;
mod sender;

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Options, Report};
use crate::demo::streaming::processes::Fleet;
use crate::error::{CommonErrors as _, Error, Result};
use hypercast_config::{Config, EngineKind};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::import::simulate::{self, simulate};

/// How long a process may take to begin.
const PATIENCE: Duration = Duration::from_secs(120);

const USERS: usize = 300;
const ITEMS: usize = 200;

/// Adds the figures of the part.
///
/// # Errors
/// A plugin that is not built; a process that ends before it is asked to.
pub fn measure(options: &Options, report: &mut Report) -> Result<()> {
    if options.wants("ingest") {
        ingest::measure(options, report)?;
    }
    if options.wants("latency") {
        latency::measure(options, report)?;
    }
    if options.wants("publish") {
        publish::measure(options, report)?;
    }
    Ok(())
}

/// A small world whose processes share one configuration.
struct Setting {
    config: Config,
    path: PathBuf,
    fleet: Fleet,
}

impl Setting {
    /// Simulates the world in `dir`; `adjust` says how the configuration differs.
    fn new(dir: &Path, engine: EngineKind, adjust: impl FnOnce(&mut Config)) -> Result<Setting> {
        simulate(&simulate::Options {
            into: dir.join("data"),
            users: USERS,
            items: ITEMS,
            requests: 500,
            surfaces: 2,
            seed: 1,
        })?;
        let mut fleet = Fleet::new(dir.join("said"), Shutdown::on_signals()?)?;
        let mut config = Config::default();
        config.join.in_daemon = false;
        config.fm.dim = 16;
        config.fm.layers = 1;
        config.fm.qk_dim = 8;
        config.fm.v_dim = 8;
        config.fm.max_history = 16;
        keep_streams(&mut config, engine, (dir, &mut fleet))?;
        adjust(&mut config);
        let path = dir.join("hypercast.toml");
        config.write(&path)?;
        Ok(Setting { config: Config::read(&path)?, path, fleet })
    }

    /// Starts a command that runs until it is stopped, and waits until it has said a word.
    fn start(&mut self, name: &str, words: &[&str], ready: &str) -> Result<String> {
        let mut args: Vec<&OsStr> = words.iter().map(OsStr::new).collect();
        args.extend([OsStr::new("--config"), self.path.as_os_str()]);
        self.fleet.start(name, &args)?;
        self.fleet.await_word(name, ready, PATIENCE)
    }

    /// Ingest, and the joiner; where events are told.
    fn begin(&mut self) -> Result<String> {
        self.start("join", &["join"], "joining from")?;
        let ingest = ["serve", "--tier", "ingest", "--listen", "127.0.0.1:0"];
        Ok(self.start("ingest", &ingest, "listening on ")? + "/v1/events")
    }
}

/// The streams' settings; a NATS server is started where they are its.
fn keep_streams(
    config: &mut Config,
    engine: EngineKind,
    (dir, fleet): (&Path, &mut Fleet),
) -> Result<()> {
    config.engine.kind = engine;
    if engine == EngineKind::Nats {
        config.engine.nats_url = fleet.start_nats(&dir.join("nats"))?;
    }
    Ok(())
}

/// A folder that is removed in the end.
fn folder() -> Result<tempfile::TempDir> {
    tempfile::tempdir().map_err(Error::io(std::env::temp_dir()))
}
