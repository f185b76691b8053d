//! The lifecycle at work: ingest and join at a rate, the age of events when a trainer learns from
//! them, how many requests a second it learns, and the cost of publications to requests that are
//! served meanwhile.
//!
//! Every part is a process of its own over loopback, as an operator runs them, except in `follow`.
//! Files are in the temporary folder (`TMPDIR`), and appends wait for its disk.

pub mod follow;
pub mod ingest;
pub mod latency;
pub mod publish;
mod sender;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use hypercast_config::{Config, EngineKind};
use hypercast_core::shutdown::Shutdown;
use hypercast_data::simulate::{SimulateOptions, simulate};

use super::world;
use crate::{error::Result, processes::ProcessGroup};

/// How long a process may take to start.
const PATIENCE: Duration = Duration::from_secs(120);

const USERS: usize = 300;
const ITEMS: usize = 200;

/// A small world whose processes share one configuration.
struct LifecycleFixture {
    config: Config,
    path: PathBuf,
    processes: ProcessGroup,
}

impl LifecycleFixture {
    /// Simulates the world in `dir`; `adjust` changes the configuration.
    fn new(
        dir: &Path,
        engine: EngineKind,
        adjust: impl FnOnce(&mut Config),
    ) -> Result<LifecycleFixture> {
        simulate(&SimulateOptions { users: USERS, items: ITEMS, ..world(dir) })?;
        let mut processes = ProcessGroup::new(dir.join("process-logs"), Shutdown::on_signals()?)?;
        let mut config = Config::default();
        config.join.in_daemon = false;
        config.fm.dim = 16;
        config.fm.layers = 1;
        config.fm.qk_dim = 8;
        config.fm.v_dim = 8;
        config.fm.max_history = 16;
        // Experts are as large as beside a large FM.
        config.plugin_limits.max_flops_share = 4.0;
        choose_engine(&mut config, engine, dir, &mut processes)?;
        adjust(&mut config);
        let path = dir.join("hypercast.toml");
        config.write(&path)?;
        Ok(LifecycleFixture { config: Config::read(&path)?, path, processes })
    }

    /// Starts a command that runs until it is stopped, and waits until it has written `ready`.
    fn start(&mut self, name: &str, words: &[&str], ready: &str) -> Result<String> {
        self.processes.start(name, words, &self.path)?;
        self.processes.await_output(name, ready, PATIENCE)
    }

    /// Starts the joiner and the ingest tier; returns the address for events.
    fn begin(&mut self) -> Result<String> {
        self.start("join", &["join"], "joining from")?;
        let ingest = ["serve", "--tier", "ingest", "--listen", "127.0.0.1:0"];
        Ok(self.start("ingest", &ingest, "listening on ")? + "/v1/events")
    }
}

/// Sets the stream engine, and starts a NATS server if it needs one.
fn choose_engine(
    config: &mut Config,
    engine: EngineKind,
    dir: &Path,
    processes: &mut ProcessGroup,
) -> Result<()> {
    config.engine.kind = engine;
    if engine == EngineKind::Nats {
        config.engine.nats_url = processes.start_nats(&dir.join("nats"))?.into();
    }
    Ok(())
}
