//! The wasmtime engine: one a process, with its instance pool and the thread
//! that ticks the epoch by which calls meet their deadlines.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use wasmtime::component::{HasSelf, Linker};
use wasmtime::{Config, InstanceAllocationStrategy, PoolingAllocationConfig, ResourceLimiter};

use super::contract::{self, Level};
use super::log::GuestLog;
use crate::expert::Error;

/// One epoch.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// Log lines that a guest may write in one call, and their length in bytes.
const LOG_LINES: u32 = 16;
const LOG_BYTES: usize = 512;

/// Sizes of the instance pool, fixed for the life of the process.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Calls that can run at one time, over all plugins.
    pub instances: u32,
    /// The most linear memory that any plugin's limit may allow, in MiB.
    pub memory_mib: u32,
    /// The guests' call stack, in KiB.
    pub stack_kib: u32,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig { instances: 64, memory_mib: 256, stack_kib: 512 }
    }
}

/// Compiles components and holds the pool. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    inner: Arc<Inner>,
}

struct Inner {
    engine: wasmtime::Engine,
    linker: Linker<HostState>,
    config: EngineConfig,
    stop: Arc<AtomicBool>,
    log: Arc<GuestLog>,
}

impl Engine {
    /// Starts an engine: reserves the pool's address space and starts the ticker.
    pub fn new(config: EngineConfig) -> Result<Engine, Error> {
        let engine = wasmtime::Engine::new(&wasmtime_config(&config)).map_err(Error::engine)?;
        let mut linker = Linker::new(&engine);
        contract::Expert::add_to_linker::<_, HasSelf<_>>(&mut linker, |state: &mut HostState| {
            state
        })
        .map_err(Error::engine)?;
        let stop = Arc::new(AtomicBool::new(false));
        start_ticker(engine.weak(), stop.clone())?;
        Ok(Engine { inner: Arc::new(Inner { engine, linker, config, stop, log: Arc::default() }) })
    }

    /// What its guests wrote of late.
    pub fn log(&self) -> &Arc<GuestLog> {
        &self.inner.log
    }

    /// The pool's sizes.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Whether fewer than half of the pool's instances are in use: the rest is
    /// kept for calls, so that no plugin's spare instances take another's place.
    pub(super) fn has_room(&self) -> bool {
        let used = self
            .inner
            .engine
            .pooling_allocator_metrics()
            .map_or(0, |pool| pool.component_instances());
        used < u64::from(self.inner.config.instances) / 2
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.inner.engine
    }

    pub(super) fn linker(&self) -> &Linker<HostState> {
        &self.inner.linker
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn wasmtime_config(config: &EngineConfig) -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(config.instances)
        .total_core_instances(config.instances * 4)
        .max_core_instances_per_component(4)
        .total_memories(config.instances)
        .max_memories_per_component(1)
        .total_tables(config.instances * 2)
        .max_tables_per_component(2)
        .max_memory_size((config.memory_mib as usize) << 20)
        // Clearing this much by hand is cheaper than giving the pages back.
        .linear_memory_keep_resident(256 << 10)
        .table_keep_resident(16 << 10);
    let mut wasmtime = Config::new();
    wasmtime
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .epoch_interruption(true)
        .max_wasm_stack((config.stack_kib as usize) << 10)
        .memory_init_cow(true);
    wasmtime
}

fn start_ticker(engine: wasmtime::EngineWeak, stop: Arc<AtomicBool>) -> Result<(), Error> {
    let tick = move || {
        while !stop.load(Ordering::Relaxed) {
            std::thread::sleep(TICK);
            match engine.upgrade() {
                Some(engine) => engine.increment_epoch(),
                None => return,
            }
        }
    };
    std::thread::Builder::new()
        .name("wasm-epochs".into())
        .spawn(tick)
        .map(drop)
        .map_err(|error| Error::engine(error.into()))
}

/// What an instance may use, and what it has used.
pub(super) struct HostState {
    pub(super) plugin: Arc<str>,
    pub(super) memory_limit: usize,
    pub(super) memory_denied: bool,
    /// The linear memory's size: it never shrinks.
    pub(super) memory_bytes: usize,
    log_lines_left: u32,
    log: Arc<GuestLog>,
}

impl HostState {
    pub(super) fn new(plugin: Arc<str>, memory_limit: usize, log: Arc<GuestLog>) -> HostState {
        HostState {
            plugin,
            memory_limit,
            memory_denied: false,
            memory_bytes: 0,
            log_lines_left: LOG_LINES,
            log,
        }
    }
}

impl ResourceLimiter for HostState {
    fn memory_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        let allowed = desired <= self.memory_limit;
        self.memory_denied |= !allowed;
        if allowed {
            self.memory_bytes = self.memory_bytes.max(desired);
        }
        Ok(allowed)
    }

    fn table_growing(
        &mut self,
        _: usize,
        desired: usize,
        _: Option<usize>,
    ) -> wasmtime::Result<bool> {
        // Indirect-call tables of real guests have hundreds of entries.
        Ok(desired <= 1 << 16)
    }
}

impl contract::hypercast::expert::types::Host for HostState {}

impl contract::ExpertImports for HostState {
    fn log(&mut self, level: Level, message: String) {
        if self.log_lines_left == 0 {
            return;
        }
        self.log_lines_left -= 1;
        let end = message.floor_char_boundary(LOG_BYTES);
        let (message, plugin) = (&message[..end], &*self.plugin);
        let word = match level {
            Level::Debug => "debug",
            Level::Info => "info",
            Level::Warn => "warn",
            Level::Error => "error",
        };
        self.log.keep(plugin, word, message);
        match level {
            Level::Debug => tracing::debug!(plugin, "{message}"),
            Level::Info => tracing::info!(plugin, "{message}"),
            Level::Warn => tracing::warn!(plugin, "{message}"),
            Level::Error => tracing::error!(plugin, "{message}"),
        }
        if self.log_lines_left == 0 {
            tracing::warn!(
                plugin,
                "wrote {LOG_LINES} log lines in one call; the rest of this call's are dropped"
            );
        }
    }
}
